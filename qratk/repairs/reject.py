"""No repair: what does not fit is thrown away and another configuration proposed (the paper's ablation)."""

from __future__ import annotations

from qratk.core.configuration import Configuration
from qratk.core.errors import RejectedConfigurationError
from qratk.core.memory import format_bytes
from qratk.core.problem import Problem
from qratk.repairs.base import RepairPolicy, repairs


@repairs.register("reject")
class RejectInfeasible(RepairPolicy):
    """Declines every configuration over the budget; the proposer then draws another."""

    def repair(self, problem: Problem, configuration: Configuration) -> Configuration:
        """The configuration itself; raises `RejectedConfigurationError` when it does not fit."""
        if problem.feasible(configuration):
            return configuration
        problem.budget.check(problem.memory)  # nothing fits: resampling for ever would not help
        raise RejectedConfigurationError(
            f"a configuration of {format_bytes(problem.bytes(configuration))} exceeds the budget of "
            f"{format_bytes(problem.budget.limit_bytes)}, and the repair policy 'reject' mends none; propose another"
        )
