"""What a task defines: how a row is read, what is learnt and scored of it, and by what figures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from qratk.core.errors import DataError
from qratk.data.encoding import Encoded
from qratk.data.scoring import Scorer
from qratk.data.sources import Row
from qratk.data.splits import Item, Split


@dataclass(frozen=True)
class ShotStyle:
    """How examples are shown before an item: behind a description, each followed by the delimiter, as in lm-eval.

    In conversations the description is the message of the system, examples are turns, and the template delimits them.
    """

    description: str = ""
    delimiter: str = "\n\n"


class Task(ABC):
    """A kind of rows; `TaskData` does with them what is the same for all kinds.

    Attributes:
        metrics: names of its figures between 0 and 1, by which it can be one of several tasks: see
            `Scorer.item_figure`. Where the task has a `score` of such a name, that is the first choice, else the first.
        shots_option: the option by which it shows examples and a description of its own, where it does.
    """

    metrics: tuple[str, ...] = ()
    shots_option: ClassVar[str | None] = None

    @abstractmethod
    def parse(self, row: Row) -> Any:
        """Content of a row, made of tuples, texts and numbers. Raises DataError (`row.error`) when it is not right."""

    def contents(self, row: Row) -> Sequence[Any]:
        """What `parse` makes of a row; of a row that holds several items, each; nothing where it holds none."""
        return (self.parse(row),)

    def form_of(self, content: Any) -> str:
        """Name of the form that a row of this content has, for people."""
        return type(self).__name__

    def fields_of(self, row: Row) -> frozenset[str]:
        """Names of the fields that a row's own content comes from: `fields_used` where all rows are alike."""
        return self.fields_used()

    @abstractmethod
    def fields_used(self) -> frozenset[str]:
        """Names of the fields that content comes from; what else rows hold is said to be ignored."""

    @abstractmethod
    def encode_training(self, items: Sequence[Item]) -> Iterator[Encoded]:
        """Rows to train on."""

    @abstractmethod
    def encode_scoring(self, items: Sequence[Item]) -> Iterator[Encoded]:
        """Rows to score, each naming its item by index; rows of an item follow one another."""

    @abstractmethod
    def scorer(self, split: Split = "validation") -> Scorer:
        """Scorer over `scoring_rows(split)`."""

    @abstractmethod
    def options(self) -> Mapping[str, Any]:
        """Options of the task that decide tokens or scores."""

    def behind(self, items: Sequence[Item], examples: Sequence[Item], style: ShotStyle) -> Sequence[Item]:
        """Items with examples shown before each. Raises DataError where the kind of rows has no such thing."""
        raise DataError(f"{type(self).__name__} shows no examples before its items: leave `shots` at 0")

    def require_figure(self, name: str, split: Split) -> None:
        """Raise DataError where it shows on the rows only that there is no figure of this name, one of `metrics`."""
        return

    def right_row(self, item: Item) -> int | None:
        """Which of the rows to score of an item is that of the right choice; None where they are no choices."""
        return None

    @property
    def joins_items(self) -> bool:
        """Whether rows to train on are made of several items."""
        return False

    def figure_weights(self, split: Split, figure: str) -> tuple[float, ...] | None:
        """Weight of each item in a figure that is one of `metrics`; None when all are equal."""
        return None

    def item_weights(self, stage: Split = "validation") -> tuple[float, ...] | None:
        """Weight of each item in the score; None when all are equal."""
        return None
