"""No local refinement: the answer is the best of the global search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qratk.core.evaluation import Evaluation, FidelityLadder, History, Request
from qratk.core.utility import Utility
from qratk.mutations.proposer import Proposer
from qratk.refiners.base import LocalRefiner, refiners


@refiners.register("none")
class NoRefiner(LocalRefiner):
    """Finished before it begins: skips the local phase (the "phase I only" ablation)."""

    def begin(self, proposer: Proposer, ladder: FidelityLadder, utility: Utility, history: History) -> None:
        """Nothing to get ready."""

    def ask(self, history: History, rng: np.random.Generator) -> tuple[Request, ...]:
        """No requests."""
        return ()

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Nothing to take in."""

    @property
    def finished(self) -> bool:
        """Always."""
        return True

    @property
    def stop_reason(self) -> str:
        """That there is no local refinement."""
        return "no local refinement"

    @property
    def diagnostics(self) -> dict[str, float]:
        """None."""
        return {}

    def planned_evaluations(self, ladder: FidelityLadder) -> dict[int, int]:
        """None."""
        return {}

    def state(self) -> dict[str, Any]:
        """Empty."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""
