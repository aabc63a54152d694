"""Batches of rows: of training, and of scoring, where rows of an item that begin alike are one row of a shared prompt.

A training batch holds `input_ids`, `attention_mask` and `labels`, each (B, T).

A scoring batch holds `input_ids` and `attention_mask`, (B, T); `row`, (R,), the scorer rows in it; `predictor`, (P,),
flat indices b * T + t of the positions that predict; `target`, (N,), the tokens predicted; `target_at`, (N,), the index
of each target's predictor; `target_row`, (N,), its index in `row`. With shared prompts, row b is a trunk followed by
branches: `segments`, (B, T), is 0 in the trunk, i in the i-th branch and -1 in the padding, and `position_ids`, (B, T),
restart after the trunk with every branch. All are int64.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qratk.core.batching import cheapest_cuts
from qratk.data.encoding import Encoded
from qratk.data.scoring import IGNORE

Batch = dict[str, Tensor]

# Attention of a shared row grows with the square of its length: it must save more than it can cost.
_LARGEST_SHARE = 0.8


@dataclass(frozen=True)
class Packed:
    """Rows, by index, that are computed as one: the first `trunk` tokens are common to them and computed once.

    A branch is what equal rows have behind the trunk; they are computed once too, so that equal choices tie exactly.
    """

    branches: tuple[tuple[int, ...], ...]
    trunk: int
    length: int


def training_batch(rows: Sequence[Encoded], pad_id: int) -> Batch:
    """One batch, padded at the right to its longest row: input_ids, attention_mask, labels, each (B, T) int64."""
    width = max(len(row.tokens) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORE)
    for index, row in enumerate(rows):
        size = len(row.tokens)
        tokens = torch.from_numpy(row.tokens.astype(np.int64))
        ids[index, :size], mask[index, :size] = tokens, 1
        labels[index, :size] = torch.where(torch.from_numpy(row.labelled), tokens, IGNORE)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def scoring_batches(
    rows: Sequence[Encoded], *, size: int, pad_id: int, shared_length: int = 0, replicas: int = 1
) -> list[Batch]:
    """Batches of all rows, longest first, padded at the right to their longest row.

    A batch has at most as many tokens, padding included, as `size` of the longest rows. Items share prompts in rows of
    at most `shared_length` tokens. There are at least `replicas` batches where there are that many rows.
    """
    packs = list(pack_rows(rows, shared_length))
    budget = size * max(len(row.tokens) for row in rows)
    most = max(1, len(packs) // replicas)
    batches = []
    # Rows that share nothing keep the plain mask, for which there are faster kernels.
    for shared in (True, False):
        group = sorted((p for p in packs if (p.trunk > 0) == shared), key=lambda pack: -pack.length)
        for cut in cheapest_cuts([pack.length for pack in group], budget=budget, most=most):
            batches.append(_collate(group[cut], rows, pad_id))
    return batches


def pack_rows(rows: Sequence[Encoded], shared_length: int) -> Iterator[Packed]:
    """Rows grouped so that each group can be computed as one row; without a trunk, a group is of equal rows."""
    for _, indices in groupby(range(len(rows)), key=lambda index: rows[index].item):
        branches = _distinct(rows, indices)
        firsts = [rows[branch[0]] for branch in branches]
        single = [Packed((branch,), 0, len(row.tokens)) for branch, row in zip(branches, firsts, strict=True)]
        trunk = _trunk(firsts) if shared_length and len(branches) > 1 else 0
        shared = _split(single, trunk, shared_length) if trunk else single
        worth = sum(pack.length for pack in shared) <= _LARGEST_SHARE * sum(pack.length for pack in single)
        yield from shared if worth else single


def _distinct(rows: Sequence[Encoded], indices: Iterable[int]) -> list[tuple[int, ...]]:
    """Indices of equal rows together, in the order of the first of them."""
    equal: dict[tuple[bytes, bytes], list[int]] = {}
    for index in indices:
        equal.setdefault((rows[index].tokens.tobytes(), rows[index].labelled.tobytes()), []).append(index)
    return [tuple(group) for group in equal.values()]


def _trunk(rows: Sequence[Encoded]) -> int:
    """Tokens that rows have in common from the start, none of them labelled, and not the whole of any row."""
    least = min(_first_label(row) for row in rows)
    common = np.stack([row.tokens[:least] for row in rows])
    differing = (common != common[0]).any(0)
    return int(differing.argmax()) if differing.any() else least


def _first_label(row: Encoded) -> int:
    """Index of the first token that is predicted (the first of a row never is), else that of the last token."""
    labelled = row.labelled[1:]
    return int(labelled.argmax()) + 1 if labelled.any() else len(row.tokens) - 1


def _split(single: Sequence[Packed], trunk: int, shared_length: int) -> list[Packed]:
    """The rows of an item behind as few trunks as fit, in their order; what is left alone stays as it is."""
    groups: list[list[Packed]] = []
    length = shared_length
    for pack in single:
        if length + pack.length - trunk > shared_length:
            groups.append([])
            length = trunk
        groups[-1].append(pack)
        length += pack.length - trunk
    return [group[0] if len(group) == 1 else _joined(group, trunk) for group in groups]


def _joined(packs: Sequence[Packed], trunk: int) -> Packed:
    branches = tuple(branch for pack in packs for branch in pack.branches)
    return Packed(branches, trunk, trunk + sum(pack.length - trunk for pack in packs))


def _collate(packs: Sequence[Packed], rows: Sequence[Encoded], pad_id: int) -> Batch:
    width = max(pack.length for pack in packs)
    shape = (len(packs), width)
    ids, mask = np.full(shape, pad_id, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    segments, positions = np.full(shape, -1, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    indices: list[int] = []
    predictors: list[NDArray[np.int64]] = []
    targets: list[NDArray[np.int32]] = []
    for number, pack in enumerate(packs):
        trunk = begin = pack.trunk
        mask[number, : pack.length] = 1
        ids[number, :trunk] = rows[pack.branches[0][0]].tokens[:trunk]
        segments[number, :trunk], positions[number, :trunk] = 0, np.arange(trunk)
        for branch, equal in enumerate(pack.branches, start=1):
            row = rows[equal[0]]
            end = begin + len(row.tokens) - trunk
            ids[number, begin:end], segments[number, begin:end] = row.tokens[trunk:], branch
            positions[number, begin:end] = np.arange(trunk, len(row.tokens))
            label = 1 + row.labelled[1:].nonzero()[0]
            before = label - 1  # in the row; behind the trunk it lies further on in the shared row
            indices += equal
            predictors += [number * width + np.where(before < trunk, before, before - trunk + begin)] * len(equal)
            targets += [row.tokens[label]] * len(equal)
            begin = end
    predictor, at = np.unique(np.concatenate(predictors), return_inverse=True)
    batch: dict[str, NDArray[Any]] = {"input_ids": ids, "attention_mask": mask}
    if packs[0].trunk:
        batch |= {"segments": segments, "position_ids": positions}
    batch |= {
        "row": np.array(indices),
        "predictor": predictor,
        "target": np.concatenate(targets),
        "target_at": at,
        "target_row": np.repeat(np.arange(len(targets)), [len(target) for target in targets]),
    }
    return {name: torch.from_numpy(value.astype(np.int64)) for name, value in batch.items()}
