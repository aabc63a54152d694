"""Scoring batches: rows by length, and the rows of an item that begin alike as one row of a shared prompt.

A batch holds `input_ids` and `attention_mask`, (B, T); `row`, (R,), the scorer rows in it; `predictor`, (P,), flat
indices b * T + t of the positions that predict; `target`, (N,), the tokens predicted; `target_at`, (N,), the index of
each target's predictor; `target_row`, (N,), its index in `row`. With shared prompts, row b is a trunk followed by
branches: `segments`, (B, T), is 0 in the trunk, i in the i-th branch and -1 in the padding, and `position_ids`, (B, T),
restart after the trunk with every branch. All are int64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from qratk.data.base import Encoded

# Attention of a shared row grows with the square of its length: it must save more than it can cost.
_LARGEST_SHARE = 0.8


@dataclass(frozen=True)
class Packed:
    """Rows, by index, that are computed as one: the first `trunk` tokens are common to them and computed once."""

    indices: tuple[int, ...]
    trunk: int
    length: int


def scoring_batches(
    rows: Sequence[Encoded], *, size: int, pad_id: int, shared_length: int = 0, replicas: int = 1
) -> list[dict[str, Tensor]]:
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
        while group:
            number = min(most, max(1, budget // group[0].length))
            batches.append(_collate(group[:number], rows, pad_id))
            group = group[number:]
    return batches


def pack_rows(rows: Sequence[Encoded], shared_length: int) -> Iterator[Packed]:
    """Rows grouped so that each group can be computed as one row; most groups of one row have no trunk."""
    for _, indices in groupby(range(len(rows)), key=lambda index: rows[index].item):
        item = list(indices)
        trunk = _trunk([rows[index] for index in item]) if shared_length and len(item) > 1 else 0
        shared = list(_split(rows, item, trunk, shared_length)) if trunk else []
        whole = sum(len(rows[index].tokens) for index in item)
        if shared and sum(pack.length for pack in shared) <= _LARGEST_SHARE * whole:
            yield from shared
        else:
            yield from (_single(rows, index) for index in item)


def _single(rows: Sequence[Encoded], index: int) -> Packed:
    return Packed((index,), 0, len(rows[index].tokens))


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


def _split(rows: Sequence[Encoded], item: Sequence[int], trunk: int, shared_length: int) -> Iterator[Packed]:
    """The rows of an item behind as few trunks as fit."""
    chosen: list[int] = []
    length = trunk
    for index in item:
        branch = len(rows[index].tokens) - trunk
        if chosen and length + branch > shared_length:
            yield Packed(tuple(chosen), trunk, length) if len(chosen) > 1 else _single(rows, chosen[0])
            chosen, length = [], trunk
        chosen.append(index)
        length += branch
    yield Packed(tuple(chosen), trunk, length) if len(chosen) > 1 else _single(rows, chosen[0])


def _collate(packs: Sequence[Packed], rows: Sequence[Encoded], pad_id: int) -> dict[str, Tensor]:
    width = max(pack.length for pack in packs)
    shape = (len(packs), width)
    ids, mask = np.full(shape, pad_id, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    segments, positions = np.full(shape, -1, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    predictors: list[NDArray[np.int64]] = []
    targets: list[NDArray[np.int32]] = []
    for number, pack in enumerate(packs):
        trunk = begin = pack.trunk
        mask[number, : pack.length] = 1
        ids[number, :trunk] = rows[pack.indices[0]].tokens[:trunk]
        segments[number, :trunk], positions[number, :trunk] = 0, np.arange(trunk)
        for branch, index in enumerate(pack.indices, start=1):
            row = rows[index]
            end = begin + len(row.tokens) - trunk
            ids[number, begin:end], segments[number, begin:end] = row.tokens[trunk:], branch
            positions[number, begin:end] = np.arange(trunk, len(row.tokens))
            label = 1 + row.labelled[1:].nonzero()[0]
            before = label - 1  # in the row; behind the trunk it lies further on in the shared row
            predictors.append(number * width + np.where(before < trunk, before, before - trunk + begin))
            targets.append(row.tokens[label])
            begin = end
    predictor, at = np.unique(np.concatenate(predictors), return_inverse=True)
    batch: dict[str, NDArray[Any]] = {"input_ids": ids, "attention_mask": mask}
    if packs[0].trunk:
        batch |= {"segments": segments, "position_ids": positions}
    batch |= {
        "row": np.array([index for pack in packs for index in pack.indices]),
        "predictor": predictor,
        "target": np.concatenate(targets),
        "target_at": at,
        "target_row": np.repeat(np.arange(len(targets)), [len(target) for target in targets]),
    }
    return {name: torch.from_numpy(value.astype(np.int64)) for name, value in batch.items()}
