"""Which rows make up training, validation and test: read, kept apart, carved and subsampled by seed."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from qratk.core.errors import DataError
from qratk.data.sources import Row, Source, content_key, read_rows, shown

_logger = logging.getLogger(__name__)

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

_NAMES = ("id", "idx")  # of rows: nobody takes them for a part of what is learnt


@dataclass(frozen=True)
class Item:
    """A checked row: what a task made of it, and the digest by which equal rows are found.

    `row_key` is the digest of the row itself, names aside, where that was asked for. `before` are the examples that
    are shown before it, in the form that the task gave them; None without any.
    """

    content: Any
    key: str
    where: str
    row_key: str = ""
    before: Any = None


@dataclass(frozen=True)
class SplitOptions:
    """Where rows come from and how many are used; the arguments of `TaskData` by the same names.

    `carves`: whether validation items are taken off the training rows where there is no `validation`. `row_keys`:
    whether items keep digests of their rows.
    """

    sources: Mapping[Split, Source | None]
    limits: Mapping[Split, int | None]
    validation_items: int | None
    validation_fraction: float
    rename: Mapping[str, str] | None
    seed: int
    carves: bool = True
    row_keys: bool = False

    def __post_init__(self) -> None:
        require_at_least("seed", self.seed, 0)
        sizes = {f"max_{split}_items": limit for split, limit in self.limits.items()}
        for name, size in {**sizes, "validation_items": self.validation_items}.items():
            if size is not None:
                require_at_least(name, size, 1)
        if not 0 < self.validation_fraction < 1:
            raise DataError(f"validation_fraction must be between 0 and 1, got {self.validation_fraction}")


def require_at_least(name: str, value: int, least: int) -> None:
    """Raise DataError for an option that is too small."""
    if value < least:
        raise DataError(f"{name} must be at least {least}, got {value}")


class Reading(Protocol):
    """How a task reads rows."""

    def contents(self, row: Row) -> Sequence[Any]:
        """Content of each item that a row holds. Raises DataError when it is not right."""
        ...

    def form_of(self, content: Any) -> str:
        """Name of the form of a row."""
        ...

    def fields_of(self, row: Row) -> frozenset[str]:
        """Names of the fields that a row's content comes from."""
        ...


class ItemsBySplit(Protocol):
    """Items of each split, and `notes` of what was dropped on the way."""

    notes: list[str]

    @property
    def items(self) -> dict[Split, tuple[Item, ...]]:
        """Items of every split, none where there is no source. Raises DataError."""
        ...


class Splits:
    """Items of each split, disjoint in content; files are read when they are first asked for.

    `notes` says what was dropped, where forms are mixed, and which fields of the rows nobody asked for.
    Raises DataError without any source.
    """

    def __init__(self, options: SplitOptions, task: Reading) -> None:
        if all(source is None for source in options.sources.values()):
            raise DataError("no data: give at least one of train, validation and test")
        self.options = options
        self._task = task
        self._unused: dict[str, None] = {}
        self.notes: list[str] = []

    @cached_property
    def items(self) -> dict[Split, tuple[Item, ...]]:
        """Items of every split, none where there is no source. Raises DataError."""
        read = {split: self._read(split) for split in SPLITS}
        for split in ("validation", "train"):
            read[split] = self._without(read[split], read["test"], split, "test")
        if self.options.carves and self.options.sources["validation"] is None and read["train"]:
            read["train"], read["validation"] = self._carve(read["train"])
        read["train"] = self._without(read["train"], read["validation"], "train", "validation")
        self._tell_ignored()
        return {split: self._subsample(read[split], split) for split in SPLITS}

    def _read(self, split: Split) -> list[Item]:
        source = self.options.sources[split]
        return [] if source is None else self.read(source, split)

    def read(self, source: Source, split: str) -> list[Item]:
        """Items of all rows of a source, which is for a split or for something else. Raises DataError."""
        rows = read_rows(source, split, rename=self.options.rename)
        items: list[Item] = []
        bare: list[str] = []
        for row in rows:
            contents = self._task.contents(row)
            items += [_item(content, row, row_keys=self.options.row_keys) for content in contents]
            if not contents:
                bare.append(row.where)
            used = self._task.fields_of(row)
            self._unused.update(
                dict.fromkeys(name for name, value in row.data.items() if value is not None and name not in used)
            )
        if bare:
            self.notes.append(f"{len(bare)} of {len(rows)} {split} rows hold no answer: left out (first: {bare[0]})")
            _logger.warning(self.notes[-1])
        if not items:
            raise DataError(f"{split} data: none of the {len(rows)} {split} rows holds an answer; give others")
        self._tell_forms(items, split)
        return items

    def _tell_forms(self, items: Sequence[Item], split: str) -> None:
        forms = Counter(self._task.form_of(item.content) for item in items)
        counted = ", ".join(f"{number} {name}" for name, number in forms.most_common())
        _logger.info("%s rows: %s", split, counted)
        if len(forms) > 1:
            self.notes.append(f"{split} rows are of several forms: {counted}")

    def _tell_ignored(self) -> None:
        used = {*(self.options.rename or {}).values(), *_NAMES}
        if ignored := [name for name in self._unused if name not in used]:
            self.notes.append(f"fields of the rows that are not used: {', '.join(map(shown, ignored))}")
            _logger.warning(self.notes[-1])

    def _without(self, items: list[Item], other: Sequence[Item], split: str, other_split: str) -> list[Item]:
        keys = {item.key for item in other}
        kept = [item for item in items if item.key not in keys]
        if dropped := len(items) - len(kept):
            self.notes.append(f"{dropped} of {len(items)} {split} rows are also in {other_split}: dropped")
        if items and not kept:
            raise DataError(f"every {split} row is also in the {other_split} data; give other files")
        return kept

    def _carve(self, items: list[Item]) -> tuple[list[Item], list[Item]]:
        options = self.options
        number = options.validation_items or max(1, round(options.validation_fraction * len(items)))
        if number >= len(items):
            raise DataError(
                f"cannot take {number} validation items off {len(items)} training rows: "
                f"lower validation_items or give a validation file"
            )
        # Items of one row stay together: the answers to one question.
        rows = [list(same) for _, same in groupby(items, key=lambda item: item.where)]
        order = permutation(len(rows), seed=options.seed, purpose="carve").tolist()
        taken = accumulate(len(rows[index]) for index in order)
        chosen = set(order[: 1 + sum(size < number for size in taken)])
        if len(chosen) == len(rows):
            raise DataError(f"cannot take {number} validation items off {len(rows)} rows: give a validation file")
        return (
            [item for index, row in enumerate(rows) if index not in chosen for item in row],
            [item for index, row in enumerate(rows) if index in chosen for item in row],
        )

    def _subsample(self, items: list[Item], split: Split) -> tuple[Item, ...]:
        return subsample(items, self.options.limits[split], seed=self.options.seed, purpose=split)


def subsample(items: Sequence[Item], limit: int | None, *, seed: int, purpose: str) -> tuple[Item, ...]:
    """At most `limit` items, drawn by the seed and what they are for, in their order."""
    if limit is None or limit >= len(items):
        return tuple(items)
    order = permutation(len(items), seed=seed, purpose=purpose)
    return tuple(items[index] for index in sorted(order[:limit]))


def _item(content: Any, row: Row, *, row_keys: bool) -> Item:
    """The item of a parsed row. Raises DataError when its texts cannot be encoded."""
    try:
        return Item(content, content_key(content), row.where, _row_key(row) if row_keys else "")
    except UnicodeEncodeError as error:
        broken = error.object[error.start : error.end]
        raise row.error(f"holds {broken!r}, half of a surrogate pair, which is no character; remove it") from error
    except RecursionError as error:
        raise row.error("is nested too deeply to be read") from error


def _row_key(row: Row) -> str:
    """Digest of all that a row says; nothing where a field that nobody asked for cannot be encoded."""
    try:
        return content_key({name: value for name, value in row.data.items() if name not in _NAMES})
    except (UnicodeEncodeError, RecursionError):
        return ""


def permutation(size: int, *, seed: int, purpose: str) -> NDArray[np.int64]:
    """Order of `size` things, (size,), that depends on the seed and on what it is for."""
    entropy = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "big")
    return np.random.default_rng([seed, entropy]).permutation(size)
