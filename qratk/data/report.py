"""What rows come to with a tokenizer: figures of each part, and rows in pieces that are learnt or not."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final

from qratk.core.errors import DataError
from qratk.core.work import working
from qratk.data.encoding import Encoded, learnable, special_ids
from qratk.data.splits import SPLITS, Item, Split

if TYPE_CHECKING:
    from qratk.data.base import TaskData

_PLACE: Final = re.compile(r", (?:line|element|row) \d+$")


@dataclass(frozen=True)
class Spread:
    """Least, median, 95th percentile and most of numbers; the percentiles are numbers that occur."""

    least: int
    median: int
    p95: int
    most: int

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Spread:
        """The spread of at least one number."""
        ordered = sorted(numbers)
        at = (0, math.ceil(0.5 * len(ordered)) - 1, math.ceil(0.95 * len(ordered)) - 1, -1)
        return cls(*(ordered[index] for index in at))


@dataclass(frozen=True)
class PartReport:
    """Figures of the rows that a split has of one data module.

    Attributes:
        split: The split.
        sources: Items by the file or data set that they come from.
        held_out: Whether these items were taken off the training data.
        forms: Items by the form of their rows.
        items: Items in use.
        rows: Rows that are trained on or scored: of choices, one each.
        tokens: Spread of the tokens of rows.
        learnt: Spread of the tokens of rows that are learnt, or scored.
        all_tokens: Tokens of all rows.
        all_learnt: Tokens of all rows that are learnt, or scored.
        cut: Rows that are longer than is allowed, and lost tokens.
        learnt_cut_off: Share of the tokens to be learnt that were cut off.
        without: Rows that are left out of training because nothing in them is learnt, or was cut off.
        ends: Rows by the special token that is learnt last; by "" where it is none.
    """

    split: Split
    sources: Mapping[str, int]
    held_out: bool
    forms: Mapping[str, int]
    items: int
    rows: int
    tokens: Spread
    learnt: Spread
    all_tokens: int
    all_learnt: int
    cut: int
    learnt_cut_off: float
    without: int
    ends: Mapping[str, int]


@dataclass(frozen=True)
class Piece:
    """A stretch of a row's text, whether it is learnt, and whether it is special tokens."""

    text: str
    learnt: bool
    special: bool


@dataclass(frozen=True)
class ShownRow:
    """A row of an item in pieces; `right` says of choices whether it is the right one."""

    pieces: tuple[Piece, ...]
    tokens: int
    learnt: int
    cut: bool
    right: bool | None = None


@dataclass(frozen=True)
class ShownItem:
    """An item, where it stands in its file, and its rows."""

    where: str
    rows: tuple[ShownRow, ...]


class DataReport:
    """Figures and rows of data that have a tokenizer attached; what is asked for is encoded once.

    `parts` are the data modules that rows are of, by split and name: the data themselves by the name of the split, or
    those that they hold. Everything raises DataError for rows that cannot be read, learnt from or scored.
    """

    def __init__(self, data: TaskData) -> None:
        self._data = data
        self._special = special_ids(data.tokenizer)
        self._rows: dict[tuple[Split, str], tuple[Encoded, ...]] = {}
        self._figures: dict[tuple[Split, str], PartReport] = {}
        self.splits: tuple[Split, ...] = tuple(split for split in SPLITS if data.has(split))
        self.parts = {(split, name): part for split in self.splits for name, part in data.parts(split).items()}
        for part in self.parts.values():
            part.attach(data.tokenizer, context_length=data.attached.context_length)

    def figures(self) -> dict[str, PartReport]:
        """Figures of every part by its name."""
        return {name: self._of_part(split, name) for split, name in self.parts}

    def examples(self, split: Split, count: int) -> dict[str, list[ShownItem]]:
        """The first rows of every part of a split; those of choices to score together, as an item."""
        return {name: self._first(split, name, count) for of, name in self.parts if of == split}

    @property
    def notes(self) -> list[str]:
        """What was dropped and why, and what else is to be known of the rows; complete once all are encoded."""
        notes = dict.fromkeys(self._data.notes)
        for (_, name), part in self.parts.items():
            if part is not self._data:
                notes |= dict.fromkeys(f"{name}: {note}" for note in part.notes)
        return list(notes)

    @property
    def end_of_sequence(self) -> str | None:
        """The token by which the tokenizer says that a text is over."""
        token: str | None = self._data.tokenizer.eos_token
        return token

    def as_dict(self) -> dict[str, Any]:
        """Figures of all parts and notes, as JSON takes them."""
        figures = {name: asdict(report) for name, report in self.figures().items()}
        return {
            "class": type(self._data).__name__,
            "max_length": self._data.max_length,
            "end_of_sequence": self.end_of_sequence,
            "parts": figures,
            "notes": self.notes,
        }

    def _of_part(self, split: Split, name: str) -> PartReport:
        if (split, name) not in self._figures:
            with self._told(split, name):
                self._figures[split, name] = self._counted(split, name)
        return self._figures[split, name]

    def _counted(self, split: Split, name: str) -> PartReport:
        part, rows = self.parts[split, name], self._encoded(split, name)
        kept = rows
        if split == "train":
            batch_size = self._data.batch_size if part is self._data else 1  # that of a part does not count
            kept = learnable(rows, max_length=part.max_length, batch_size=batch_size)
        learnt = [_learnt(row) for row in kept]
        items = part.items(split)
        return PartReport(
            split=split,
            sources=dict(Counter(_PLACE.sub("", item.where) for item in items)),
            held_out=split == "validation" and part.sources[split] is None and part.sources["train"] is not None,
            forms=part.forms(split),
            items=len(items),
            rows=len(kept),
            tokens=Spread.of([len(row.tokens) for row in kept]),
            learnt=Spread.of(learnt),
            all_tokens=sum(len(row.tokens) for row in kept),
            all_learnt=sum(learnt),
            cut=sum(row.truncated for row in rows),
            learnt_cut_off=_cut_off(part, split, rows),
            without=len(rows) - len(kept),
            ends=dict(Counter(map(self._end, kept)).most_common()),
        )

    def _first(self, split: Split, name: str, count: int) -> list[ShownItem]:
        with self._told(split, name):
            part, rows = self.parts[split, name], self._encoded(split, name)
            items = part.items(split)
        shown: list[ShownItem] = []
        if split == "train":
            places = ["rows joined" if part.joins_items else items[row.item].where for row in rows[:count]]
            return [ShownItem(place, (self._shown(row),)) for place, row in zip(places, rows, strict=False)]
        for index, of_item in groupby(rows, key=lambda row: row.item):
            if len(shown) >= count:
                break
            item, encoded = items[index], list(of_item)
            right = part.right_row(item)
            if right is None:
                shown += [ShownItem(item.where, (self._shown(row),)) for row in encoded[: count - len(shown)]]
            else:
                choices = tuple(self._shown(row, k == right) for k, row in enumerate(encoded))
                shown.append(ShownItem(item.where, choices))
        return shown

    def _encoded(self, split: Split, name: str) -> tuple[Encoded, ...]:
        if (split, name) not in self._rows:
            part = self.parts[split, name]
            with working(f"encoding {name} rows"):
                self._rows[split, name] = tuple(_encode(part, split, part.items(split)))
        return self._rows[split, name]

    @contextmanager
    def _told(self, split: Split, name: str) -> Iterator[None]:
        """Context in which errors name the part that they are of, where data hold several."""
        try:
            yield
        except DataError as error:
            if self.parts[split, name] is self._data:
                raise
            raise DataError(f"{name}: {error}") from error

    def _end(self, row: Encoded) -> str:
        last = int(row.tokens[row.labelled][-1]) if row.labelled[1:].any() else -1
        return str(self._data.tokenizer.decode([last])) if last in self._special else ""

    def _shown(self, row: Encoded, right: bool | None = None) -> ShownRow:
        return ShownRow(self._pieces(row), len(row.tokens), _learnt(row), row.truncated, right)

    def _pieces(self, row: Encoded) -> tuple[Piece, ...]:
        """Stretches of tokens of one kind; the text of each is what it adds to that of the tokens before."""
        ids = row.tokens.tolist()
        kinds = [(bool(label) and at > 0, ids[at] in self._special) for at, label in enumerate(row.labelled)]
        pieces: list[Piece] = []
        text, end = "", 0
        for (learnt, special), run in groupby(kinds):
            begin, end = end, end + len(list(run))
            longer = self._text(ids[:end])
            added = longer[len(text) :] if longer.startswith(text) else self._text(ids[begin:end])
            pieces.append(Piece(added, learnt, special))
            text = longer
        return tuple(pieces)

    def _text(self, ids: Sequence[int]) -> str:
        return str(self._data.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _encode(data: TaskData, split: Split, items: Sequence[Item]) -> Iterator[Encoded]:
    return data.encode_training(items) if split == "train" else data.encode_scoring(items)


def _cut_off(data: TaskData, split: Split, rows: Sequence[Encoded]) -> float:
    """Share of the tokens to be learnt that were cut off: items with cut rows are encoded without a limit."""
    cut = sorted({row.item for row in rows if row.truncated})
    if not cut:
        return 0.0
    items = [data.items(split)[index] for index in cut]
    there = sum(map(_learnt, _encode(data.without_limit(), split, items)))
    kept = sum(_learnt(row) for row in rows if row.item in set(cut))
    every = sum(map(_learnt, rows)) - kept + there
    return max(0, there - kept) / every if every else 0.0


def _learnt(row: Encoded) -> int:
    """Tokens of a row that are learnt or scored: the first one is never predicted."""
    return int(row.labelled[1:].sum())


def prompt_of(rows: Sequence[ShownRow]) -> tuple[Piece, ...]:
    """What all rows of an item begin with and none of them learns; nothing where they begin otherwise."""
    heads = {tuple(row.pieces[: next((k for k, p in enumerate(row.pieces) if p.learnt), 0)]) for row in rows}
    return heads.pop() if len(heads) == 1 else ()
