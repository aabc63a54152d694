"""The contract of local refiners."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from qratk.core.evaluation import Evaluation, FidelityLadder, History, Request
from qratk.core.utility import Utility
from qratk.mutations.proposer import Proposer
from qratk.registry import Registry


class LocalRefiner(ABC):
    """Improves on the best of phase I with few further evaluations.

    The loop calls `begin` once, then `ask`, evaluates the requests, and `tell`, until `finished`. A request may name
    a lower rung: such a short run informs later proposals. State and randomness are as for `GlobalSearcher`.
    """

    @abstractmethod
    def begin(self, proposer: Proposer, ladder: FidelityLadder, utility: Utility, history: History) -> None:
        """Get ready; the history's evaluations at the highest rung are the starting points."""

    @abstractmethod
    def ask(self, history: History, rng: np.random.Generator) -> tuple[Request, ...]:
        """Next feasible configurations to measure, none measured before at those steps; empty when finished."""

    @abstractmethod
    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Take in what was measured of the last requests, in their order."""

    @property
    @abstractmethod
    def finished(self) -> bool:
        """Whether to stop."""

    @property
    @abstractmethod
    def stop_reason(self) -> str:
        """Why it finished, in words; empty before."""

    @property
    @abstractmethod
    def diagnostics(self) -> dict[str, float]:
        """Scalars of the last proposal to be logged, e.g. expected improvement and radius."""

    @abstractmethod
    def planned_evaluations(self, ladder: FidelityLadder) -> dict[int, int]:
        """Largest number of evaluations at each rung (steps): for the plan of a search, before `begin`."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """All that the next `ask` depends on besides the history, as plain data that JSON can hold."""

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a saved state, after `begin`."""


refiners: Registry[LocalRefiner] = Registry("refiners", "LocalRefiner")
