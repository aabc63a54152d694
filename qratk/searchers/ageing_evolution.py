"""Ageing (regularised) evolution: the oldest dies, not the worst (Real, Aggarwal, Huang and Le 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qratk.core.configuration import Configuration
from qratk.core.edits import DEFAULT_EPSILON
from qratk.core.errors import ConfigurationError
from qratk.core.evaluation import Candidate, Evaluation, FidelityLadder, History
from qratk.mutations._proposer import Proposer
from qratk.searchers._survival import Member, highest_rungs
from qratk.searchers._warm_start import initial_candidates, random_candidates
from qratk.searchers.base import GlobalSearcher, searchers


@searchers.register("ageing_evolution")
class AgeingEvolution(GlobalSearcher):
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
        if population < 1 or offspring < 1 or not 1 <= sample <= population:
            raise ConfigurationError(
                "population and offspring must be at least 1 and sample from 1 to population, "
                f"got {population}, {offspring} and {sample}"
            )
        if not epsilon > 0:
            raise ConfigurationError(f"epsilon must be positive, got {epsilon}")
        self.population = population
        self.sample = sample
        self.offspring = offspring
        self.warm_start = warm_start
        self.epsilon = epsilon
        self._proposer: Proposer | None = None
        self._queue: tuple[Member, ...] = ()
        self._generation = 0
        self._exhausted = False

    def begin(self, proposer: Proposer, ladder: FidelityLadder) -> None:
        """Forget everything."""
        self._proposer = proposer
        self._queue, self._generation, self._exhausted = (), 0, False

    def ask(self, history: History, rng: np.random.Generator) -> tuple[Candidate, ...]:
        """The initial population first; later the mutated winners of tournaments."""
        if self._generation == 0:
            self._queue = ()
            self._enqueue([e for e in history if self._in_space(e.configuration)])
        known = {evaluation.configuration for evaluation in history}
        found = self._initial(known, rng) if self._generation == 0 else self._children(known, rng)
        taken = {*known, *(candidate.configuration for candidate in found)}
        missing = self.offspring - len(found)
        found += random_candidates(self._begun.problem, rng, size=missing, generation=self._generation, known=taken)
        self._exhausted = not found
        return found

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """The candidates join the queue in the order in which they were asked for; the oldest members die."""
        self._enqueue(evaluations)
        self._generation += 1

    @property
    def finished(self) -> bool:
        """Whether nothing new could be proposed."""
        return self._exhausted

    @property
    def generation_size(self) -> int:
        """`offspring`."""
        return self.offspring

    def state(self) -> dict[str, Any]:
        """The queue, the oldest first, and the generation's number."""
        return {
            "generation": self._generation,
            "queue": [member.to_plain() for member in self._queue],
            "exhausted": self._exhausted,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        problem = self._begun.problem
        self._generation = int(state["generation"])
        self._queue = tuple(Member.from_plain(plain, problem) for plain in state["queue"])
        self._exhausted = bool(state["exhausted"])

    @property
    def _begun(self) -> Proposer:
        assert self._proposer is not None, "begin comes first"
        return self._proposer

    def _in_space(self, configuration: Configuration) -> bool:
        problem = self._begun.problem
        bits, ranks = set(problem.space.bits), set(problem.space.ranks)
        on_ladders = bits.issuperset(configuration.bits) and ranks.issuperset(configuration.ranks)
        return on_ladders and len(configuration) == problem.num_layers and problem.feasible(configuration)

    def _enqueue(self, evaluations: Sequence[Evaluation]) -> None:
        new = highest_rungs([Member.of(evaluation, self._begun.problem) for evaluation in evaluations])
        self._queue = (*self._queue, *new)[-self.population :]

    def _initial(self, known: set[Configuration], rng: np.random.Generator) -> tuple[Candidate, ...]:
        if not self.warm_start:
            return ()
        return initial_candidates(self._begun, rng, size=self.offspring, epsilon=self.epsilon, known=known)

    def _children(self, known: set[Configuration], rng: np.random.Generator) -> tuple[Candidate, ...]:
        children: dict[Configuration, Candidate] = {}
        while self._queue and len(children) < self.offspring:
            parent = self._tournament(rng).configuration
            child = self._begun.propose(parent, rng, known={*known, *children}, generation=self._generation)
            if child is None:  # nothing new near the winner: the rest of the generation is drawn at random
                break
            children[child.configuration] = child
        return tuple(children.values())

    def _tournament(self, rng: np.random.Generator) -> Member:
        """The best of `sample` different members drawn at random."""
        drawn = rng.choice(len(self._queue), size=min(self.sample, len(self._queue)), replace=False)
        return max((self._queue[int(i)] for i in drawn), key=_merit)


def _merit(member: Member) -> tuple[bool, int, float]:
    """Failures last, then the higher rung, then the larger score."""
    return member.score is not None, member.steps, -np.inf if member.score is None else member.score
