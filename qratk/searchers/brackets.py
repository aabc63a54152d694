"""Brackets of Hyperband, a base also for plugins: how many candidates begin at which rung."""

from __future__ import annotations

import math

from qratk.core.evaluation import FidelityLadder
from qratk.searchers.generations import GenerationSearcher

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


class BracketSearcher(GenerationSearcher):
    """Cycles over brackets, one a generation: bracket s begins at rung s, with fewer candidates (Li et al. 2018).

    All brackets take about the same optimiser steps. The first explores most: `offspring` candidates from the lowest
    rung; the last runs few candidates at the highest rung straight away, in case short runs mislead. The numbers
    follow from `offspring` and the ladder's eta; the loop's number for the highest rung is not used.
    """

    def next_size(self) -> int:
        """As many as the generation's bracket begins with."""
        return bracket_size(self.ladder, self.offspring, self.generation % len(self.ladder.steps))

    def schedule(self, ladder: FidelityLadder, candidates: int, high: int) -> Schedule:
        """The bracket of the generation just asked for, from its first rung up; `high` is not used."""
        return halving(ladder, candidates, self.generation % len(ladder.steps))

    @property
    def bracket_cost(self) -> int:
        """Optimiser steps of the first bracket, once `begin` was called."""
        return cost(halving(self.ladder, self.offspring, 0))

    def planned_evaluations(self, ladder: FidelityLadder, high: int, generations: int) -> dict[int, int]:
        """Sum over the brackets of so many generations."""
        planned: dict[int, int] = dict.fromkeys(ladder.steps, 0)
        for generation in range(generations):
            first = generation % len(ladder.steps)
            for steps, size in halving(ladder, bracket_size(ladder, self.offspring, first), first):
                planned[steps] += size
        return planned
