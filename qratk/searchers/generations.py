"""Bases, also for plugins, of searchers by generations, many or one; a strategy adds what it proposes and learns."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError
from qratk.core.evaluation import Candidate, Evaluation, FidelityLadder, History
from qratk.core.problem import Problem
from qratk.core.shared import Shared
from qratk.mutations.proposer import Proposer
from qratk.searchers._warm_start import leading_shared, random_candidates
from qratk.searchers.base import GlobalSearcher


class GenerationSearcher(GlobalSearcher):
    """Counts generations, fills each up at random, and is finished once nothing new is found.

    A strategy writes `proposals`. One that remembers more than the generation's number extends `begin`, `tell`,
    `state` and `restore`; one whose generations differ in size writes `next_size`.
    """

    ladder: FidelityLadder
    """The ladder that `begin` was given."""
    generation: int
    """Number of the coming generation, from 0."""

    def __init__(self, offspring: int) -> None:
        if offspring < 1:
            raise ConfigurationError(f"offspring must be at least 1, got {offspring}")
        self.offspring = offspring
        self._proposer: Proposer | None = None
        self.generation = 0
        self._exhausted = False

    def begin(self, proposer: Proposer, ladder: FidelityLadder) -> None:
        """Forget everything."""
        self._proposer, self.ladder = proposer, ladder
        self.generation, self._exhausted = 0, False

    def ask(self, history: History, rng: np.random.Generator) -> tuple[Candidate, ...]:
        """What the strategy proposes, then random candidates up to the generation's size."""
        problem, size = self.proposer.problem, self.next_size()
        known = {evaluation.configuration for evaluation in history}
        found = self.proposals(history, rng, size=size, known=known)
        taken = {*known, *(candidate.configuration for candidate in found)}
        found += random_candidates(problem, rng, size=size - len(found), generation=self.generation, known=taken)
        self._exhausted = not found
        return found

    @abstractmethod
    def proposals(
        self, history: History, rng: np.random.Generator, *, size: int, known: Collection[Configuration]
    ) -> tuple[Candidate, ...]:
        """At most `size` feasible candidates, without repeats and none known; what is missing is drawn at random."""

    def leading(self, history: History) -> Shared:
        """Shared settings for candidates that say nothing of them: the best of those measured, or the middle ones."""
        space = self.proposer.problem.space
        found = leading_shared(self.proposer.problem, history)
        return space.middle if found is None else found

    def next_size(self) -> int:
        """Candidates wanted of the coming generation."""
        return self.offspring

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """On to the next generation."""
        self.generation += 1

    @property
    def finished(self) -> bool:
        """Whether nothing new was found."""
        return self._exhausted

    @property
    def generation_size(self) -> int:
        """`offspring`."""
        return self.offspring

    def state(self) -> dict[str, Any]:
        """The generation's number, and whether nothing new was found."""
        return {"generation": self.generation, "exhausted": self._exhausted}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.generation = int(state["generation"])
        self._exhausted = bool(state["exhausted"])

    @property
    def proposer(self) -> Proposer:
        """The proposer that `begin` was given, with the problem."""
        assert self._proposer is not None, "begin comes first"
        return self._proposer


class SingleGenerationSearcher(GlobalSearcher):
    """Proposes once and is finished, whatever is measured. A strategy writes `candidates`."""

    def __init__(self) -> None:
        self._problem: Problem | None = None
        self._asked = False

    def begin(self, proposer: Proposer, ladder: FidelityLadder) -> None:
        """Forget everything."""
        self._problem, self._asked = proposer.problem, False

    def ask(self, history: History, rng: np.random.Generator) -> tuple[Candidate, ...]:
        """All that this searcher ever proposes, less what was measured before; nothing the second time."""
        assert self._problem is not None, "begin comes first"
        if self._asked:
            return ()
        self._asked = True
        return self.candidates(self._problem, {evaluation.configuration for evaluation in history})

    @abstractmethod
    def candidates(self, problem: Problem, known: Collection[Configuration]) -> tuple[Candidate, ...]:
        """The one generation: at most `generation_size` feasible candidates, without repeats and none known.

        They may be without shared settings, which the loop then tunes.
        """

    @property
    def settles(self) -> bool:
        """False: whoever asks only once cannot learn settings."""
        return False

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Results change nothing."""

    def planned_evaluations(self, ladder: FidelityLadder, high: int, generations: int) -> dict[int, int]:
        """Those of one generation."""
        return super().planned_evaluations(ladder, high, min(generations, 1))

    @property
    def finished(self) -> bool:
        """Whether the one generation was asked for."""
        return self._asked

    def state(self) -> dict[str, Any]:
        """Whether the one generation was asked for."""
        return {"asked": self._asked}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self._asked = bool(state["asked"])
