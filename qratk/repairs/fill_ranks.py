"""Repair for a search over bits alone: it keeps the bits, and ranks are what the budget leaves."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from qratk.core.configuration import Configuration, LayerChoice
from qratk.core.edits import DEFAULT_EPSILON
from qratk.core.problem import Problem
from qratk.repairs.base import RepairPolicy, repairs
from qratk.repairs.greedy import GreedyDowngrade


@repairs.register("fill_ranks")
class FillRanks(RepairPolicy):
    """Ranks as high and as even as the budget allows, whatever they were, so that bits alone are searched.

    All layers have the highest rank of the ladder that fits for all; what is left raises them a rung at a time, those
    whose adapters are held for most important first, until no layer's next rung fits. Bits are lowered only where they
    do not fit at the lowest rank, by the greedy repair. Meant for adapters that are `cut` with `allocation: model`, for
    which configured ranks say nothing but how many bytes are dealt out to singular directions: with every rank up to
    the width on the ladder, less is left over than the cheapest layer takes for one more rank.

    Args:
        epsilon: of the greedy repair.
    """

    fills: ClassVar[bool] = True

    def __init__(self, epsilon: float = DEFAULT_EPSILON) -> None:
        self._bits = GreedyDowngrade(epsilon)
        self.epsilon = epsilon

    def repair(self, problem: Problem, configuration: Configuration) -> Configuration:
        """Configuration of the same bits that fills the budget; raises `InfeasibleBudgetError` when no bits fit."""
        lowest = problem.space.ranks[0]
        bare = Configuration(tuple(LayerChoice(b, lowest) for b in configuration.bits), configuration.shared)
        return raised(problem, self._bits.repair(problem, bare))


def raised(problem: Problem, configuration: Configuration) -> Configuration:
    """A feasible configuration of the lowest ranks with its ranks raised until the budget is full."""
    table = problem.table("rank")  # (L, rungs)
    room = problem.budget.limit_bytes - problem.bytes(configuration)
    everywhere = (table - table[:, :1]).sum(axis=0)
    level = int(np.flatnonzero(everywhere <= room)[-1])
    room -= int(everywhere[level])
    indices = problem.space.indices(configuration)
    indices[:, 1] = level
    order = np.argsort(-problem.normalised_importance["rank"], kind="stable").tolist()
    growing = True
    while growing:
        growing = False
        for layer in order:
            rung = int(indices[layer, 1])
            if rung + 1 < table.shape[1] and (added := int(table[layer, rung + 1] - table[layer, rung])) <= room:
                indices[layer, 1] += 1
                room -= added
                growing = True
    return problem.space.from_indices(indices, configuration.shared)
