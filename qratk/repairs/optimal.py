"""Repair by the downgrades that cost the least importance in sum: what Eq. 8 approximates one step at a time."""

from __future__ import annotations

import numpy as np

from qratk.core.configuration import Configuration
from qratk.core.edits import DEFAULT_EPSILON, Ledger
from qratk.core.errors import ConfigurationError
from qratk.core.problem import Problem
from qratk.programs.binary import least_binary
from qratk.repairs._steps import StepsDown, lowered
from qratk.repairs.base import RepairPolicy, repairs
from qratk.repairs.greedy import GreedyDowngrade

TOLERANCE = 1e-6
LARGEST = 4000


@repairs.register("optimal")
class OptimalDowngrade(RepairPolicy):
    """Downgrades with the smallest sum of (importance + epsilon) over steps that restores the budget.

    An integer program, solved up to `gap`. Greedy overshoots: one bit step saves what some 40 rank steps do, and it
    takes one also where a single rank step would be enough. Measured: 6 ms for 16 layers and 80 ms for 80, greedy 0.2
    and 0.4. The greedy repair stands in where the solver finds nothing, and over `LARGEST` steps, where the two differ
    by less than the gap.

    Args:
        epsilon: added to the normalised importance.
        gap: relative gap at which the solver stops.
    """

    def __init__(self, epsilon: float = DEFAULT_EPSILON, gap: float = 1e-3) -> None:
        if not (epsilon > 0 and gap >= 0):
            raise ConfigurationError(f"epsilon must be positive and gap not negative, got {epsilon} and {gap}")
        self.epsilon = epsilon
        self.gap = gap

    def repair(self, problem: Problem, configuration: Configuration) -> Configuration:
        """Repaired configuration, within the budget; raises `InfeasibleBudgetError` when nothing fits."""
        ledger = Ledger(problem, configuration)
        if ledger.fits:
            return configuration
        steps = StepsDown.of(problem, ledger.indices, self.epsilon)
        for slack in (0.0, 2 * TOLERANCE):  # the solver may miss a limit by its tolerance: then ask for a little more
            taken = self._solved(steps, ledger, slack) if 0 < steps.layer.size <= LARGEST else None
            repaired = configuration if taken is None else lowered(ledger, steps, taken)
            if problem.feasible(repaired):
                return repaired
        return GreedyDowngrade(self.epsilon).repair(problem, configuration)

    def _solved(self, steps: StepsDown, ledger: Ledger, slack: float) -> np.ndarray | None:
        """Which steps to take, (n,); None when no choice of them is enough."""
        from scipy.optimize import LinearConstraint
        from scipy.sparse import csr_array

        count = steps.layer.size
        later = np.flatnonzero(steps.order > 0)
        rows = np.arange(later.size)
        in_order = csr_array(
            (np.r_[np.ones(later.size), -np.ones(later.size)], (np.r_[rows, rows], np.r_[later, later - 1])),
            shape=(later.size, count),
        )
        constraints = [LinearConstraint(in_order, ub=0)] if later.size else []
        for saved, excess in (
            (steps.saved_bytes, float(ledger.excess_bytes)),
            (steps.saved_bits, float(ledger.excess_weighted_bits)),
        ):
            if excess > 0:  # in units of the excess, which keeps the solver's tolerances meaningful
                constraints.append(LinearConstraint(csr_array(saved[None] / excess), lb=1.0 + slack))
        solution = least_binary(steps.importance, constraints, gap=self.gap)
        return None if solution is None else solution > 0.5
