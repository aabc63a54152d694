"""The contract of executors: where evaluations happen."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from qratk.core.evaluation import Evaluation, Request
from qratk.core.space import SearchSpace
from qratk.evaluators.base import EvaluationContext, Evaluator
from qratk.registry import Registry

if TYPE_CHECKING:
    from lightning import Trainer

    from qratk.data.base import TaskData
    from qratk.training.module import FineTuneModule

Group = Sequence[Request]
"""Requests that are measured at once and recorded at once."""


@dataclass(frozen=True)
class Equipment:
    """What evaluations are made with: the evaluator, and the Lightning objects that it wants."""

    evaluator: Evaluator
    module: FineTuneModule | None = None
    datamodule: TaskData | None = None
    trainer: Callable[..., Trainer] | None = None


class Blueprint(Protocol):
    """Plain data, which can be sent to another process, from which the same equipment is built there."""

    def build(self) -> Equipment:
        """The equipment, not opened yet."""


class Executor(ABC):
    """Has groups of requests measured, here or elsewhere.

    The loop calls `open` and `begin` once, then `finished` and `tested` again and again, and `close` at the end, after
    an error too. Decisions, random states and the journal stay with the loop: an executor knows nothing but what it is
    handed, and what comes of a request must not depend on which executor it is, nor on what was measured before.
    """

    @property
    @abstractmethod
    def workers(self) -> int:
        """How many groups are measured at the same time, at most."""

    @abstractmethod
    def open(self, evaluator: Evaluator, context: EvaluationContext, blueprint: Blueprint | None) -> None:
        """Open the evaluator; `blueprint` rebuilds it elsewhere, None where nothing was given to rebuild it from.

        Raises `ConfigurationError` when this executor needs more than it was given.
        """

    @abstractmethod
    def begin(self, space: SearchSpace) -> None:
        """Take the space whose configurations will be asked for (references may lie off it)."""

    @abstractmethod
    def finished(self, groups: Iterable[Group]) -> Iterator[tuple[Group, Sequence[Evaluation]]]:
        """Each group with its evaluations, in the order of its requests; groups come as they end, in any order.

        A group is taken from `groups` when it can begin and not earlier: how the next is cut may depend on what came of
        those before. Closing the iterator gives up what is being measured.
        """

    @abstractmethod
    def tested(self, evaluations: Iterable[Evaluation]) -> Iterator[tuple[Evaluation, dict[str, float]]]:
        """Each evaluation with its scores on test data, as they end, in any order; called only after the search."""

    @abstractmethod
    def close(self) -> None:
        """Let go of whatever was begun."""


executors: Registry[Executor] = Registry("executors", "Executor")
