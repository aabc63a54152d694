"""Ageing (regularised) evolution: the oldest dies, not the worst (Real, Aggarwal, Huang and Le 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qratk.core.edits import DEFAULT_EPSILON
from qratk.core.errors import ConfigurationError
from qratk.core.evaluation import Evaluation, History
from qratk.searchers._evolution import EvolutionSearcher
from qratk.searchers._survival import Member, highest_rungs
from qratk.searchers.base import searchers


@searchers.register("ageing_evolution")
class AgeingEvolution(EvolutionSearcher):
    """Breeds from the winners of tournaments in a queue whose oldest members die (Real et al. 2019, Algorithm 1).

    The paper breeds one child at a time; here a generation is bred from the queue as it stands. What was measured
    before the search (the uniform baselines) is the oldest of the queue. Scores compare at the highest rung that
    both could reach: of two members the one at the higher rung wins, within a rung the larger score; a failure loses
    against all.

    Args:
        population: length of the queue.
        sample: members that compete in a tournament.
        offspring: candidates a generation.
        warm_start: start from importance-shaped prototypes (Eq. 6); else at random.
        epsilon: added to the normalised importance in the warm start.
    """

    def __init__(
        self,
        population: int = 40,
        sample: int = 10,
        offspring: int = 25,
        warm_start: bool = True,
        epsilon: float = DEFAULT_EPSILON,
    ) -> None:
        super().__init__(offspring, warm_start=warm_start, epsilon=epsilon)
        if not 1 <= sample <= population:
            raise ConfigurationError(
                f"population must be at least 1 and sample from 1 to population, got {population} and {sample}"
            )
        self.population = population
        self.sample = sample

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """The candidates join the queue in the order in which they were asked for; the oldest members die."""
        self._enqueue(evaluations)
        super().tell(evaluations)

    def state(self) -> dict[str, Any]:
        """The queue, the oldest first, and the generation's number."""
        return super().state() | {"queue": [member.to_plain() for member in self._members]}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        super().restore(state)
        self._members = tuple(Member.from_plain(plain, self.proposer.problem) for plain in state["queue"])

    def _take_in_baselines(self, history: History) -> None:
        """The queue begins with what was measured before the search."""
        if self.generation == 0:
            self._members = ()
            problem = self.proposer.problem
            usable = [e for e in history if e.configuration in problem.space and problem.feasible(e.configuration)]
            self._enqueue(usable)

    def _enqueue(self, evaluations: Sequence[Evaluation]) -> None:
        new = highest_rungs([Member.of(evaluation, self.proposer.problem) for evaluation in evaluations])
        self._members = (*self._members, *new)[-self.population :]

    def _tournament(self, rng: np.random.Generator) -> Member:
        """The best of `sample` different members drawn at random."""
        drawn = rng.choice(len(self._members), size=min(self.sample, len(self._members)), replace=False)
        return max((self._members[int(i)] for i in drawn), key=_merit)


def _merit(member: Member) -> tuple[bool, int, float]:
    """Failures last, then the higher rung, then the larger score."""
    return member.score is not None, member.steps, -np.inf if member.score is None else member.score
