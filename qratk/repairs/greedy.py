"""The paper's repair: the downgrade that costs least importance per byte saved, until the budget holds (Eq. 7-8)."""

from __future__ import annotations

import heapq

import numpy as np

from qratk.core.configuration import Configuration
from qratk.core.edits import DEFAULT_EPSILON, Ledger, weights_of_layers
from qratk.core.errors import ConfigurationError
from qratk.core.problem import Problem
from qratk.repairs._steps import smallest_or_raise
from qratk.repairs.base import RepairPolicy, repairs


@repairs.register("greedy")
class GreedyDowngrade(RepairPolicy):
    """Takes again and again the single-step downgrade with the least (importance + epsilon) / bytes saved (Eq. 8).

    Ties go to the larger saving, then the lower layer, then bits before rank. A cap on the average bits is met first,
    by bit downgrades, with weights times bits in place of bytes; the paper, which has such a row in its tables, does
    not say how.

    Args:
        epsilon: added to the importance, as in the proposals (Eq. 9).
    """

    def __init__(self, epsilon: float = DEFAULT_EPSILON) -> None:
        if not epsilon > 0:
            raise ConfigurationError(f"epsilon must be positive, got {epsilon}")
        self.epsilon = epsilon

    def repair(self, problem: Problem, configuration: Configuration) -> Configuration:
        """Repaired configuration, within the budget; raises `InfeasibleBudgetError` when no downgrade helps."""
        ledger = Ledger(problem, configuration)
        if ledger.fits:
            return configuration
        weights = weights_of_layers(problem, self.epsilon)
        while not ledger.fits:
            if not _relieve(ledger, weights):
                return smallest_or_raise(problem, configuration)
        return ledger.configuration()


def _relieve(ledger: Ledger, weights: np.ndarray) -> bool:
    """Downgrade until the limit in force holds; False when it cannot. A heap holds the next step of each knob."""
    saved, excess = ledger.relief()
    capped = ledger.excess_weighted_bits > 0
    layers, columns = np.nonzero(saved > 0)
    savings = saved[layers, columns]
    costs = weights[layers, columns] / savings
    heap = list(zip(costs.tolist(), (-savings).tolist(), layers.tolist(), columns.tolist(), strict=True))
    heapq.heapify(heap)
    while heap and excess > 0:
        _, negative, layer, column = heapq.heappop(heap)
        ledger.step(layer, column, -1)
        excess += negative
        following = _next_saving(ledger, layer, column, capped)
        if following > 0:
            heapq.heappush(heap, (float(weights[layer, column]) / following, -following, layer, column))
    return excess <= 0


def _next_saving(ledger: Ledger, layer: int, column: int, capped: bool) -> float:
    index = int(ledger.indices[layer, column])
    if index == 0:
        return 0.0
    if not capped:
        return float(-ledger.step_bytes(layer, column, -1))
    bits = ledger.problem.space.bits
    return float(ledger.problem.memory.parameters[layer] * (bits[index] - bits[index - 1]))
