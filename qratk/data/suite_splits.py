"""Items of a suite: each member's own, none in two splits, and behind the examples that they are shown with."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np

from qratk.core.errors import DataError
from qratk.data.base import TaskData
from qratk.data.splits import SPLITS, Item, Split, permutation, subsample
from qratk.data.suite_members import SuiteTask, TrainingSource, told

_DRAWN_BEFORE: Final[Mapping[Split, tuple[Split, ...]]] = {
    "test": (),
    "validation": ("test",),
    "train": ("test", "validation"),
}

_HELD_OUT: Final[tuple[Split, Split]] = ("test", "validation")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SuiteItem(Item):
    """An item of a suite: its `content` is the item that the member with this number has."""

    member: int = 0


@dataclass(frozen=True)
class Member:
    """A data module, where it stands in the suite, and the split that it is there for."""

    data: TaskData
    place: str
    split: Split


class SuiteSplits:
    """Items of all members, split by split; the members keep no others. `notes` says what was dropped.

    Test items are drawn first, then validation items from what is not among them, then training items from what is in
    neither: rows are the same where the whole row is, or what a kind of task makes of it.
    """

    def __init__(
        self, sources: Sequence[TrainingSource], tasks: Mapping[Split, Mapping[str, SuiteTask]], *, seed: int
    ) -> None:
        self._sources, self._tasks, self._seed = sources, tasks, seed
        self.notes: list[str] = []
        self.examples: dict[str, tuple[Item, ...]] = {}  # by place
        self.ranks: dict[str, tuple[int, ...]] = {}  # of a member's items in the order in which they were drawn
        trained = [Member(source.data, f"train[{index}]", "train") for index, source in enumerate(sources)]
        scored = [Member(task.data, f"{s}.{name}", s) for s in SPLITS[1:] for name, task in tasks[s].items()]
        self.members = (*trained, *scored)

    @cached_property
    def items(self) -> dict[Split, tuple[Item, ...]]:
        """Items of every split, member by member. Raises DataError."""
        self._compare_names()
        held_out: dict[Split, list[Item]] = {"test": [], "validation": []}
        for split in _HELD_OUT:
            for name, task in self._tasks[split].items():
                held_out[split] += self._drawn(task.data, split, f"{split}.{name}", task.most_items, held_out)
        for split in _HELD_OUT:
            for name, task in self._tasks[split].items():
                self._show_examples(task, split, name, [*held_out["test"], *held_out["validation"]])
        for index, source in enumerate(self._sources):
            self._drawn(source.data, "train", f"train[{index}]", source.items, held_out)
        self._take_notes()
        return {split: tuple(self._of_members(split)) for split in SPLITS}

    def _compare_names(self) -> None:
        for split, other in (_HELD_OUT, _HELD_OUT[::-1]):
            alone = [name for name in self._tasks[split] if name not in self._tasks[other]]
            if alone and self._tasks[other]:
                self._say(f"tasks of {split} that {other} does not have: {', '.join(alone)}")

    def _say(self, text: str) -> None:
        self.notes.append(text)
        _logger.warning(text)

    def _drawn(
        self, data: TaskData, split: Split, place: str, limit: int | None, held_out: Mapping[Split, Sequence[Item]]
    ) -> tuple[Item, ...]:
        """A member's items of its split, which are in none of those held out before."""
        with told(place):
            items = list(data.items(split))
        for other in _DRAWN_BEFORE[split]:
            items = self._without(items, held_out[other], place, other)
        order = permutation(len(items), seed=self._seed, purpose=place)[:limit]
        kept = np.sort(order)
        drawn = tuple(items[index] for index in kept)
        self.ranks[place] = tuple(np.argsort(order).tolist())
        data.narrow(split, drawn)
        return drawn

    def _without(self, items: list[Item], others: Iterable[Item], place: str, other: str) -> list[Item]:
        keys = _keys(others)
        kept = [item for item in items if not keys & _keys([item])]
        if dropped := len(items) - len(kept):
            self._say(f"{dropped} of {len(items)} rows of {place} are also in {other}: dropped")
        if not kept:
            raise DataError(
                f"{place}: every row is also in the {other} data; give other files, or fewer `items` to {other}"
            )
        return kept

    def _show_examples(self, task: SuiteTask, split: Split, name: str, held_out: Sequence[Item]) -> None:
        data, place = task.data, f"{split}.{name}"
        if not task.shots and not task.description:
            return
        with told(place):
            drawn = self._examples(task, name, held_out) if task.shots else ()
            data.narrow(split, data.behind(data.items(split), drawn, task.style))
        self.examples[place] = tuple(drawn)

    def _examples(self, task: SuiteTask, name: str, held_out: Sequence[Item]) -> tuple[Item, ...]:
        """Rows of the task that are scored nowhere; the same for validation and test, where they have the same rows."""
        pool = task.data.items("train") if task.examples is None else task.data.read(task.examples, "examples")
        keys = _keys(held_out)
        free = [item for item in pool if not keys & _keys([item])]
        if len(free) < task.shots:
            raise DataError(
                f"{task.shots} shots, but there are {len(free)} rows to draw them from that are not scored themselves: "
                f"give more `examples`, or fewer shots"
            )
        return subsample(free, task.shots, seed=self._seed, purpose=f"shots of {name}")

    def _take_notes(self) -> None:
        for member in self.members:
            self.notes += [f"{member.place}: {note}" for note in member.data.notes]

    def _of_members(self, split: Split) -> Iterable[SuiteItem]:
        for number, member in enumerate(self.members):
            if member.split == split:
                for item in member.data.items(split):
                    yield SuiteItem(item, item.key, item.where, member=number)


def _keys(items: Iterable[Item]) -> set[str]:
    """What rows are found by: their own digests, and those of what was made of them."""
    return {key for item in items for key in (item.key, item.row_key) if key}
