"""The contract of repair policies."""

from __future__ import annotations

from abc import ABC, abstractmethod

from qratk.core.configuration import Configuration
from qratk.core.problem import Problem
from qratk.registry import Registry


class RepairPolicy(ABC):
    """Projects a configuration into the budget. Deterministic and idempotent; feasible ones stay as they are."""

    @abstractmethod
    def repair(self, problem: Problem, configuration: Configuration) -> Configuration:
        """Feasible configuration.

        Raises `RejectedConfigurationError` when the policy declines to mend it (another is then proposed), and
        `InfeasibleBudgetError` when nothing on the ladders fits.
        """


repairs: Registry[RepairPolicy] = Registry("repairs", "RepairPolicy")
