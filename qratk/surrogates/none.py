"""No surrogate: candidates are promoted by their measured low-fidelity score (the paper's ablation)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from qratk.core.correlation import spearman
from qratk.core.evaluation import Evaluation, History, Prediction, SurrogateQuality
from qratk.core.problem import Problem
from qratk.surrogates.base import PromotionSurrogate, surrogates


@surrogates.register("none")
class NoSurrogate(PromotionSurrogate):
    """Is never trusted; still reports how well the low-fidelity score ranks by itself."""

    def __init__(self) -> None:
        self._quality: SurrogateQuality | None = None

    def fit(self, problem: Problem, history: History, *, low: int, high: int) -> None:
        """Nothing to learn; the low-fidelity rank correlation is noted."""
        pairs = history.paired(low, high)
        plain = spearman([a.score for a, _ in pairs], [b.score for _, b in pairs])
        self._quality = SurrogateQuality(len(pairs), math.nan, math.nan, plain)

    def predict(self, problem: Problem, evaluations: Sequence[Evaluation]) -> tuple[Prediction, ...]:
        """The measured low-fidelity scores."""
        return tuple(Prediction(e.configuration, e.score) for e in evaluations)

    @property
    def trusted(self) -> bool:
        """Never."""
        return False

    @property
    def quality(self) -> SurrogateQuality | None:
        """Number of pairs and the low-fidelity rank correlation."""
        return self._quality
