"""Batches of rows: of training, and of scoring, where rows of an item that begin alike are one row of a shared prompt.

A training batch holds `input_ids`, `attention_mask` and `labels`, each (B, T).

A scoring batch holds `input_ids` and `attention_mask`, (B, T); `row`, (R,), the scorer rows in it; `predictor`, (P,),
flat indices b * T + t of the positions that predict; `target`, (N,), the tokens predicted; `target_at`, (N,), the index
of each target's predictor; `target_row`, (N,), its index in `row`. With shared prompts, row b is a trunk followed by
branches: `segments`, (B, T), is 0 in the trunk, a number of its own in each branch and -1 in the padding, and
`position_ids`, (B, T), restart after the trunk with every branch. Several items that are shown with the same examples
share these in the trunk, and what each item's choices share lies between trunk and branches, in a stem with a number of
its own: `parents`, (B, T), is the number of the stem in its branches, and 0 elsewhere. All are int64.

A batch of prompts to go on from holds `input_ids` and `attention_mask`, (B, T), padded at the left, `row`, (B,), and
`most`, (B,), the tokens that are generated at most. Where all of its prompts begin alike, that is `prefix`, (P,), and
`input_ids` are what each has behind it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qratk.core.batching import BATCH_COST, cheapest_cuts
from qratk.data.encoding import Encoded
from qratk.data.scoring import IGNORE

Batch = dict[str, Tensor]

# Attention of a shared row grows with the square of its length: it must save more than it can cost.
_LARGEST_SHARE = 0.8
_ALIKE: Final = 16  # tokens that prompts begin with in common at least, if what they have in common is computed once
_TOGETHER = 1024  # tokens of a row of several items at most, beyond which its attention costs more than is shared


@dataclass(frozen=True)
class Packed:
    """Rows, by index, that are computed as one: the first `trunk` tokens are common to them and computed once.

    A branch is what equal rows have behind the trunk; they are computed once too, so that equal choices tie exactly.
    With rows of several items, `stems` says of each branch which item of the row it is of, and up to which of its
    tokens the item's branches are alike.
    """

    branches: tuple[tuple[int, ...], ...]
    trunk: int
    length: int
    stems: tuple[tuple[int, int], ...] = ()


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
    rows: Sequence[Encoded],
    *,
    size: int,
    pad_id: int,
    shared_length: int = 0,
    replicas: int = 1,
    groups: Sequence[int] | None = None,
) -> list[Batch]:
    """Batches of all rows, longest first, padded at the right to their longest row.

    A batch has at most as many tokens, padding included, as `size` of the longest rows. Items share prompts in rows of
    at most `shared_length` tokens; so do items of a group, as `pack_rows` has them, and prompts to go on from that
    begin alike, in texts of at most as many. There are at least `replicas` batches where there are that many rows.
    """
    prompts = [index for index, row in enumerate(rows) if row.generates]
    batches = _prompt_batches(rows, prompts, size, pad_id, replicas, shared_length) if prompts else []
    if len(prompts) == len(rows):
        return batches
    budget = size * max(len(row.tokens) for row in rows if not row.generates)
    packs = list(pack_rows(rows, shared_length, groups=groups, together=min(_TOGETHER, budget)))
    most = max(1, len(packs) // replicas)
    # Rows that share nothing keep the plain mask, for which there are faster kernels.
    for shared in (True, False):
        group = sorted((p for p in packs if (p.trunk > 0) == shared), key=lambda pack: -pack.length)
        for cut in cheapest_cuts([pack.length for pack in group], budget=budget, most=most):
            batches.append(_collate(group[cut], rows, pad_id))
    return batches


def _prompt_batches(
    rows: Sequence[Encoded], prompts: Sequence[int], size: int, pad_id: int, replicas: int, shared_length: int
) -> list[Batch]:
    """Batches of prompts to go on from, padded at the left, what may become longest first, but those with one prefix
    one behind the other."""

    def length(index: int) -> int:
        return len(rows[index].tokens) + rows[index].generates

    budget, most = size * max(map(length, prompts)), max(1, len(prompts) // replicas)
    batches = []
    sets = [(prefix, sorted(own, key=lambda i: -length(i))) for prefix, own in _prefixed(rows, prompts, shared_length)]
    for prefix, ordered in sorted(sets, key=lambda one: -length(one[1][0])):
        cuts = cheapest_cuts([length(index) for index in ordered], budget=budget, most=most)
        batches += [_prompt_batch(ordered[cut], rows, pad_id, prefix) for cut in cuts]
    return batches


def _prefixed(
    rows: Sequence[Encoded], prompts: Sequence[int], shared_length: int
) -> Iterator[tuple[int, Sequence[int]]]:
    """Prompts that begin alike, and in how many tokens; last, with 0, those that have too little in common."""
    alike: dict[bytes, list[int]] = {}
    for index in prompts:
        alike.setdefault(rows[index].tokens[:_ALIKE].tobytes(), []).append(index)
    rest: list[int] = []
    for own in alike.values():
        prefix = common_prefix([rows[index].tokens for index in own])
        longest = max(len(rows[index].tokens) + rows[index].generates for index in own)
        if longest <= shared_length and worth_sharing(prefix, len(own)):
            yield prefix, own
        else:
            rest += own
    if rest:
        yield 0, rest


def common_prefix(prompts: Sequence[NDArray[np.int32]]) -> int:
    """Tokens that prompts begin with in common, and behind which each has another one."""
    least = min(map(len, prompts)) - 1
    differing = (np.stack([prompt[:least] for prompt in prompts]) != prompts[0][:least]).any(0)
    return int(differing.argmax()) if differing.any() else least


def worth_sharing(prefix: int, prompts: int) -> bool:
    """Whether computing a prefix of so many tokens once for so many prompts saves more than a pass for it costs."""
    return prefix >= _ALIKE and prefix * (prompts - 1) > BATCH_COST


def _prompt_batch(indices: Sequence[int], rows: Sequence[Encoded], pad_id: int, prefix: int) -> Batch:
    behind = [rows[index].tokens[prefix:] for index in indices]
    width = max(map(len, behind))
    ids = torch.full((len(indices), width), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for place, tokens in enumerate(behind):
        ids[place, width - len(tokens) :] = torch.from_numpy(tokens.astype(np.int64))
        mask[place, width - len(tokens) :] = 1
    most = torch.tensor([rows[index].generates for index in indices])
    batch = {"input_ids": ids, "attention_mask": mask, "row": torch.tensor(indices), "most": most}
    shared = rows[indices[0]].tokens[:prefix]
    return {**batch, "prefix": torch.from_numpy(shared.astype(np.int64))} if prefix else batch


def pack_rows(
    rows: Sequence[Encoded], shared_length: int, *, groups: Sequence[int] | None = None, together: int = _TOGETHER
) -> Iterator[Packed]:
    """Rows grouped so that each group can be computed as one row; without a trunk, a group is of equal rows.

    `groups` names the group of each item, whose rows begin with the same examples; -1 where there are none. Items of a
    group that follow one another share a row of at most `together` tokens.
    """
    scored = [index for index, row in enumerate(rows) if not row.generates]
    items = [list(indices) for _, indices in groupby(scored, key=lambda index: rows[index].item)]
    if groups is None or not shared_length:
        groups = [-1] * (1 + max(row.item for row in rows))
    for group, members in groupby(items, key=lambda indices: groups[rows[indices[0]].item]):
        apart = [(indices, list(_pack_item(rows, indices, shared_length))) for indices in members]
        alone = [pack for _, packs in apart for pack in packs]
        joined = _pack_together(rows, apart, min(shared_length, together)) if group >= 0 else alone
        worth = sum(pack.length for pack in joined) <= _LARGEST_SHARE * sum(pack.length for pack in alone)
        yield from joined if worth else alone


def _pack_item(rows: Sequence[Encoded], indices: Sequence[int], shared_length: int) -> Iterator[Packed]:
    """An item's rows."""
    branches = _distinct(rows, indices)
    firsts = [rows[branch[0]] for branch in branches]
    single = [Packed((branch,), 0, len(row.tokens)) for branch, row in zip(branches, firsts, strict=True)]
    trunk = _trunk(firsts) if shared_length and len(branches) > 1 else 0
    shared = _split(single, trunk, shared_length) if trunk else single
    worth = sum(pack.length for pack in shared) <= _LARGEST_SHARE * sum(pack.length for pack in single)
    yield from shared if worth else single


def _pack_together(
    rows: Sequence[Encoded], items: Sequence[tuple[list[int], list[Packed]]], longest: int
) -> list[Packed]:
    """Items behind what all their rows begin with, as many in a row as fit; one that does not fit is packed as it is
    given."""
    trunk = _trunk([rows[index] for indices, _ in items for index in indices])
    packs: list[Packed] = []
    branches: list[tuple[int, ...]] = []
    stems: list[tuple[int, int]] = []
    length = trunk

    def finish() -> None:
        if branches:
            packs.append(Packed(tuple(branches), trunk, length, tuple(stems)))
        branches.clear()
        stems.clear()

    for number, (indices, alone) in enumerate(items):
        own = _distinct(rows, indices)
        firsts = [rows[branch[0]] for branch in own]
        stem = _trunk(firsts) if len(own) > 1 else trunk
        size = stem - trunk + sum(len(row.tokens) - stem for row in firsts)
        if not trunk or trunk + size > longest:
            packs += alone
            continue
        if length + size > longest:
            finish()
            length = trunk
        branches += own
        stems += [(number, stem)] * len(own)
        length += size
    finish()
    return packs


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


class _Line:
    """A row of a batch that is filled segment by segment; arrays are those of the batch, (B, T)."""

    def __init__(self, arrays: Mapping[str, NDArray[np.int64]], number: int) -> None:
        self._of = {name: values[number] for name, values in arrays.items()}
        self._begin = self.segment = 0  # the next one

    def put(self, row: Encoded, first: int, last: int, parent: int = 0) -> NDArray[np.int64]:
        """Write tokens of a row as the next segment; where in the line they come to lie."""
        place = slice(self._begin, self._begin + last - first)
        self._of["input_ids"][place], self._of["attention_mask"][place] = row.tokens[first:last], 1
        self._of["position_ids"][place] = np.arange(first, last)
        self._of["segments"][place], self._of["parents"][place] = self.segment, parent
        self._begin, self.segment = place.stop, self.segment + 1
        return np.arange(place.start, place.stop)


def _collate(packs: Sequence[Packed], rows: Sequence[Encoded], pad_id: int) -> Batch:
    width = max(pack.length for pack in packs)
    fills = {"input_ids": pad_id, "attention_mask": 0, "segments": -1, "position_ids": 0, "parents": 0}
    arrays = {name: np.full((len(packs), width), fill, dtype=np.int64) for name, fill in fills.items()}
    indices: list[int] = []
    predictors: list[NDArray[np.int64]] = []
    targets: list[NDArray[np.int32]] = []
    for number, pack in enumerate(packs):
        line = _Line(arrays, number)
        trunk = before = line.put(rows[pack.branches[0][0]], 0, pack.trunk)
        item, parent = -1, 0
        for equal, (own, end) in zip(pack.branches, pack.stems or [(-1, pack.trunk)] * len(pack.branches), strict=True):
            row = rows[equal[0]]
            if own != item:
                item, before, parent = own, trunk, 0
                if end > pack.trunk:
                    parent = line.segment
                    before = np.concatenate([trunk, line.put(row, pack.trunk, end)])
            place = np.concatenate([before, line.put(row, end, len(row.tokens), parent)])  # of each token of the row
            label = 1 + row.labelled[1:].nonzero()[0]
            indices += equal
            predictors += [number * width + place[label - 1]] * len(equal)
            targets += [row.tokens[label]] * len(equal)
    predictor, at = np.unique(np.concatenate(predictors), return_inverse=True)
    names = ["input_ids", "attention_mask"] + (["segments", "position_ids"] if packs[0].trunk else [])
    names += ["parents"] if any(pack.stems for pack in packs) else []
    batch: dict[str, NDArray[Any]] = {name: arrays[name] for name in names}
    batch |= {
        "row": np.array(indices),
        "predictor": predictor,
        "target": np.concatenate(targets),
        "target_at": at,
        "target_row": np.repeat(np.arange(len(targets)), [len(target) for target in targets]),
    }
    return {name: torch.from_numpy(value.astype(np.int64)) for name, value in batch.items()}
