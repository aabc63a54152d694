"""What refiners share that spend up to a cap of evaluations at the highest rung; a strategy adds which, and state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError
from qratk.core.evaluation import Candidate, Evaluation, FidelityLadder, History
from qratk.core.utility import Utility
from qratk.mutations.proposer import Proposer
from qratk.refiners._measured import ranked, utility_of
from qratk.refiners.base import LocalRefiner


class CappedRefiner(LocalRefiner):
    """Starts from what was measured at the highest rung, counts evaluations there, and keeps why it stopped.

    A strategy writes `origin` and `ask`, which calls `_finish` when nothing is left to try. It extends `begin`, `tell`,
    `state` and `restore` by what it remembers; the count of evaluations is saved by the strategy too.
    """

    origin: ClassVar[str]
    """The strategy's name, for candidates and errors."""

    def __init__(self, max_evaluations: int) -> None:
        if max_evaluations < 0:
            raise ConfigurationError(f"{self.origin}: max_evaluations must not be negative, got {max_evaluations}")
        self.max_evaluations = max_evaluations

    def begin(self, proposer: Proposer, ladder: FidelityLadder, utility: Utility, history: History) -> None:
        """Forget everything; finished at once without a starting point, or when the cap is 0."""
        self._proposer, self._ladder, self._utility = proposer, ladder, utility
        self._evaluations = 0
        self._diagnostics: dict[str, float] = {}
        self._stop = "no local evaluations are allowed" if self.max_evaluations == 0 else ""
        if not self._ranked(history):
            self._stop = "no feasible configuration was measured at the highest rung"

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Count, and stop at the cap."""
        self._count(len(evaluations))

    @property
    def finished(self) -> bool:
        """Whether there is a reason to stop."""
        return bool(self._stop)

    @property
    def stop_reason(self) -> str:
        """Why it finished; empty before."""
        return self._stop

    @property
    def diagnostics(self) -> dict[str, float]:
        """Of the last proposal; which, the strategy says."""
        return dict(self._diagnostics)

    def planned_evaluations(self, ladder: FidelityLadder) -> dict[int, int]:
        """The cap, at the highest rung."""
        return {ladder.highest: self.max_evaluations}

    def state(self) -> dict[str, Any]:
        """Stop reason and diagnostics."""
        return {"stop": self._stop, "diagnostics": dict(self._diagnostics)}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self._stop = state["stop"]
        self._diagnostics = dict(state["diagnostics"])

    def _count(self, evaluations: int) -> None:
        """Count evaluations at the highest rung; stop at the cap."""
        self._evaluations += evaluations
        if not self._stop and self._evaluations >= self.max_evaluations:
            self._stop = f"the cap of {self.max_evaluations} local evaluations was reached"

    def _finish(self, reason: str) -> tuple[()]:
        """Stop; the empty answer to `ask`."""
        self._stop = reason
        return ()

    def _candidate(self, configuration: Configuration, *parents: Configuration) -> Candidate:
        digests = tuple(parent.digest for parent in parents)
        return Candidate(configuration, self.origin, digests, generation=self._evaluations, phase="local")

    def _ranked(self, history: History) -> list[Configuration]:
        """Feasible configurations measured at the highest rung, best first."""
        return ranked(self._proposer.problem, self._utility, history, self._ladder.highest)

    def _utility_of(self, history: History, configuration: Configuration) -> float:
        """Utility of a configuration that was measured at the highest rung."""
        return utility_of(self._utility, history, configuration, self._ladder.highest)

    def _spent(self, history: History) -> set[Configuration]:
        """What ran at the highest rung or failed at any."""
        return {e.configuration for e in history if not e.ok or e.steps == self._ladder.highest}
