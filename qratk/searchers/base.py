"""The contract of global searchers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qratk.core.evaluation import Candidate, Evaluation, FidelityLadder, History
from qratk.mutations.proposer import Proposer
from qratk.registry import Registry

if TYPE_CHECKING:
    from qratk.evaluators.base import EvaluationContext


class GlobalSearcher(ABC):
    """Proposes a generation of candidates at a time.

    The loop calls `attach` and `begin` once, then again and again `ask`, fine-tunes and promotes the candidates, and
    calls `tell` with all that was measured of them. After each `tell` it saves `state`; a resumed search calls `begin`
    and then `restore` instead of starting anew. All randomness comes from the `rng` argument, whose state the loop
    saves.
    """

    def attach(self, context: EvaluationContext) -> None:  # noqa: B027  # most searchers need no model
        """Take what the evaluator was opened with, its model among it; called once, before `begin`."""

    @abstractmethod
    def begin(self, proposer: Proposer, ladder: FidelityLadder) -> None:
        """Forget everything and get ready for the proposer's problem."""

    @abstractmethod
    def ask(self, history: History, rng: np.random.Generator) -> tuple[Candidate, ...]:
        """Feasible candidates of the next generation, without repeats and none of them in the history.

        They have the shared settings of the problem's space, or none; see `settles`.

        An empty tuple ends the phase: nothing new can be proposed.
        """

    @abstractmethod
    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Take in what was measured of the last generation: at most one evaluation a candidate and rung."""

    def schedule(self, ladder: FidelityLadder, candidates: int, high: int) -> tuple[tuple[int, int], ...]:
        """Rungs that the generation just asked for runs at, ascending up to the highest: (steps, how many candidates).

        `candidates` is the size of the generation and `high` the loop's number for the highest rung. By default
        successive halving over all rungs: eta times fewer at each. A schedule may begin at a higher rung.
        """
        return tuple(zip(ladder.steps, ladder.sizes(candidates, high), strict=True))

    def planned_evaluations(self, ladder: FidelityLadder, high: int, generations: int) -> dict[int, int]:
        """Largest number of evaluations at each rung (steps) in so many generations, before `begin`."""
        sizes = self.schedule(ladder, self.generation_size, high)
        return {steps: generations * size for steps, size in sizes}

    @property
    def settles(self) -> bool:
        """Whether candidates come with the shared settings of the search, where there are any.

        The loop measures a candidate without them with every combination, and goes on with the best: such a searcher
        needs no say in settings, and is tuned as uniform baselines are.
        """
        return True

    @property
    @abstractmethod
    def finished(self) -> bool:
        """Whether the searcher itself wants to stop (the loop has its own stopping rules)."""

    @property
    @abstractmethod
    def generation_size(self) -> int:
        """Largest number of candidates that one `ask` returns: for the plan of a search, before `begin`."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """All that the next `ask` depends on, as plain data that JSON can hold."""

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""


searchers: Registry[GlobalSearcher] = Registry("searchers", "GlobalSearcher")
