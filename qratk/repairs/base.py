"""The contract of repair policies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from qratk.core.configuration import Configuration
from qratk.core.problem import Problem
from qratk.registry import Registry


class RepairPolicy(ABC):
    """Projects a configuration into the budget. Deterministic and idempotent; feasible ones stay as they are.

    A policy that `fills` the budget keeps of a feasible one the bits alone, and chooses ranks by what is left.
    """

    fills: ClassVar[bool] = False
    """Whether it chooses ranks by what the budget leaves, of feasible configurations too."""

    @abstractmethod
    def repair(self, problem: Problem, configuration: Configuration) -> Configuration:
        """Feasible configuration.

        Raises `RejectedConfigurationError` when the policy declines to mend it (another is then proposed), and
        `InfeasibleBudgetError` when nothing on the ladders fits.
        """


repairs: Registry[RepairPolicy] = Registry("repairs", "RepairPolicy")
