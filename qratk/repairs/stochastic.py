"""Repair by random downgrades, the likelier the less importance they cost a byte: Eq. 8 softened."""

from __future__ import annotations

import numpy as np

from qratk.core.configuration import Configuration
from qratk.core.edits import DEFAULT_EPSILON, Ledger
from qratk.core.errors import ConfigurationError
from qratk.core.problem import Problem
from qratk.repairs._steps import StepsDown, lowered, smallest_or_raise
from qratk.repairs.base import RepairPolicy, repairs


@repairs.register("stochastic")
class StochasticDowngrade(RepairPolicy):
    """Draws downgrades with Pr ~ (bytes saved / (importance + epsilon))^gamma until the budget holds.

    The generator is seeded by the configuration itself: the same one is always repaired to the same. A smaller gamma
    lowers ranks more often, which Eq. 8 hardly ever does.

    Args:
        gamma: concentration; the larger, the closer to the greedy repair.
        epsilon: added to the normalised importance.
    """

    def __init__(self, gamma: float = 1.5, epsilon: float = DEFAULT_EPSILON) -> None:
        if not (gamma > 0 and epsilon > 0):
            raise ConfigurationError(f"gamma and epsilon must be positive, got {gamma} and {epsilon}")
        self.gamma = gamma
        self.epsilon = epsilon

    def repair(self, problem: Problem, configuration: Configuration) -> Configuration:
        """Repaired configuration, within the budget; raises `InfeasibleBudgetError` when nothing fits."""
        ledger = Ledger(problem, configuration)
        rng = np.random.default_rng(int(configuration.digest, 16))
        repaired = configuration
        while not ledger.fits:  # the cap on the average bits first, then the bytes
            steps = StepsDown.of(problem, ledger.indices, self.epsilon)
            over_cap = ledger.excess_weighted_bits
            saved = steps.saved_bits if over_cap > 0 else steps.saved_bytes
            order = self._drawn(steps, saved, rng)
            enough = np.flatnonzero(np.cumsum(saved[order]) >= (over_cap if over_cap > 0 else ledger.excess_bytes))
            if not len(enough):
                return smallest_or_raise(problem, configuration)
            repaired = lowered(ledger, steps, order[: enough[0] + 1])
            ledger = Ledger(problem, repaired)
        return repaired

    def _drawn(self, steps: StepsDown, saved: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Steps in the order in which they are drawn, each from the next steps of all chains.

        Drawing again and again by weight is a race of exponential clocks, and a chain's next clock starts when the last
        one rang: so that all draws are one sort, also for 10,000 layers. A step that saves nothing stops its chain.
        """
        worth = np.maximum(saved, 0) / steps.importance
        rate = (worth / max(float(worth.max(initial=0.0)), 1.0)) ** self.gamma
        clocks = np.full(rate.size, np.inf)
        np.divide(rng.standard_exponential(rate.size), rate, out=clocks, where=rate > 0)
        rung = _summed_by_chain(clocks, steps.order)
        return np.argsort(rung, kind="stable")[: int(np.isfinite(rung).sum())]


def _summed_by_chain(clocks: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Running sums that start anew with each chain; chains are as short as a ladder."""
    total = clocks.copy()
    for place in range(1, int(order.max(initial=0)) + 1):
        here = np.flatnonzero(order == place)
        total[here] += total[here - 1]
    return total
