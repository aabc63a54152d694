"""Brackets of Hyperband: how many candidates begin at which rung."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError
from qratk.core.evaluation import Candidate, Evaluation, FidelityLadder, History
from qratk.mutations._proposer import Proposer
from qratk.searchers._warm_start import random_candidates
from qratk.searchers.base import GlobalSearcher

Schedule = tuple[tuple[int, int], ...]


def halving(ladder: FidelityLadder, candidates: int, first: int) -> Schedule:
    """Successive halving from rung `first` up: (steps, how many), eta times fewer at each, one at least."""
    factor = ladder.reduction_factor
    rungs = enumerate(ladder.steps[first:])
    # Less a hair: 27 / 3.0000000001**2 must not be rounded up to 4 by what rounding left over.
    return tuple((steps, max(1, math.ceil(candidates / factor**k - 1e-9))) for k, steps in rungs)


def cost(schedule: Schedule) -> int:
    """Optimiser steps of a schedule: what goes on to the next rung continues where it was."""
    before, total = 0, 0
    for steps, size in schedule:
        total += size * (steps - before)
        before = steps
    return total


def bracket_size(ladder: FidelityLadder, offspring: int, first: int) -> int:
    """Most candidates that may begin at rung `first` within the steps that `offspring` from the lowest rung take."""
    allowed = cost(halving(ladder, offspring, 0))
    size = min(offspring, max(1, allowed // ladder.steps[first]))
    while size > 1 and cost(halving(ladder, size, first)) > allowed:
        size -= 1
    return size


class BracketSearcher(GlobalSearcher):
    """Cycles over brackets, one a generation: bracket s begins at rung s, with fewer candidates (Li et al. 2018).

    All brackets take about the same optimiser steps. The first explores most: `offspring` candidates from the lowest
    rung; the last runs few candidates at the highest rung straight away, in case short runs mislead. The numbers
    follow from `offspring` and the ladder's eta; the loop's number for the highest rung is not used.
    """

    def __init__(self, offspring: int) -> None:
        if offspring < 1:
            raise ConfigurationError(f"offspring must be at least 1, got {offspring}")
        self.offspring = offspring
        self._proposer: Proposer | None = None
        self._ladder: FidelityLadder | None = None
        self._generation = 0
        self._exhausted = False

    def begin(self, proposer: Proposer, ladder: FidelityLadder) -> None:
        """Forget everything."""
        self._proposer, self._ladder = proposer, ladder
        self._generation, self._exhausted = 0, False

    def ask(self, history: History, rng: np.random.Generator) -> tuple[Candidate, ...]:
        """As many candidates as the generation's bracket begins with."""
        proposer, ladder = self._begun
        known = {evaluation.configuration for evaluation in history}
        size = bracket_size(ladder, self.offspring, self._generation % len(ladder.steps))
        found = self._proposals(proposer, ladder, history, rng, size=size, known=known)
        taken = {*known, *(candidate.configuration for candidate in found)}
        found += random_candidates(
            proposer.problem, rng, size=size - len(found), generation=self._generation, known=taken
        )
        self._exhausted = not found
        return found

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """On to the next bracket."""
        self._generation += 1

    def schedule(self, ladder: FidelityLadder, candidates: int, high: int) -> Schedule:
        """The bracket of the generation just asked for, from its first rung up; `high` is not used."""
        return halving(ladder, candidates, self._generation % len(ladder.steps))

    def planned_evaluations(self, ladder: FidelityLadder, high: int, generations: int) -> dict[int, int]:
        """Sum over the brackets of so many generations."""
        planned: dict[int, int] = dict.fromkeys(ladder.steps, 0)
        for generation in range(generations):
            first = generation % len(ladder.steps)
            for steps, size in halving(ladder, bracket_size(ladder, self.offspring, first), first):
                planned[steps] += size
        return planned

    @property
    def finished(self) -> bool:
        """Whether nothing new could be proposed."""
        return self._exhausted

    @property
    def generation_size(self) -> int:
        """`offspring`: the size of the first bracket, the largest."""
        return self.offspring

    def state(self) -> dict[str, Any]:
        """The generation's number, which tells its bracket."""
        return {"generation": self._generation, "exhausted": self._exhausted}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self._generation = int(state["generation"])
        self._exhausted = bool(state["exhausted"])

    @property
    def _begun(self) -> tuple[Proposer, FidelityLadder]:
        assert self._proposer is not None, "begin comes first"
        assert self._ladder is not None
        return self._proposer, self._ladder

    @abstractmethod
    def _proposals(
        self,
        proposer: Proposer,
        ladder: FidelityLadder,
        history: History,
        rng: np.random.Generator,
        *,
        size: int,
        known: Collection[Configuration],
    ) -> tuple[Candidate, ...]:
        """At most `size` feasible candidates, none known; what is missing is drawn at random."""
