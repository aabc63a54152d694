"""One figure for score and bytes together (Eq. 4, 11)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qratk.core.errors import ConfigurationError
from qratk.core.evaluation import Evaluation
from qratk.core.memory import Scope


@dataclass(frozen=True)
class Utility:
    """f = alpha * score - (1 - alpha) * bytes, both min-max normalised over frozen ranges (Eq. 4).

    The paper names no set for the ranges; here they are taken once, over the high-fidelity measurements at the end
    of the global phase, and then frozen, so that utilities may leave [0, 1].
    """

    alpha: float
    scores: tuple[float, float]
    bytes: tuple[float, float]
    scope: Scope = "storage"

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise ConfigurationError(f"alpha must lie in [0, 1], got {self.alpha}")

    @classmethod
    def over(cls, evaluations: Sequence[Evaluation], *, alpha: float, scope: Scope = "storage") -> Utility:
        """Utility whose ranges are those of the given successful evaluations."""
        done = [e for e in evaluations if e.ok]
        if not done:
            raise ConfigurationError("a utility needs at least one successful evaluation for its ranges")
        scores = [e.score for e in done]
        sizes = [float(e.footprint.bytes(scope)) for e in done]
        return cls(alpha, (min(scores), max(scores)), (min(sizes), max(sizes)), scope)

    def of(self, evaluation: Evaluation) -> float:
        """Utility of a measured evaluation; -inf when it failed."""
        if not evaluation.ok:
            return float("-inf")
        return self.at(evaluation.score, evaluation.footprint.bytes(self.scope))

    def at(self, score: float, size_bytes: float) -> float:
        """Utility of a score and a number of bytes.

        A range of bytes without extent counts as 0. Scores without one, as of a single measurement, count as they are:
        what is measured later must be told apart.
        """
        low, high = self.scores
        worth = (score - low) / (high - low if high > low else 1.0)
        low, high = self.bytes
        size = (size_bytes - low) / (high - low) if high > low else 0.0
        return self.alpha * worth - (1 - self.alpha) * size
