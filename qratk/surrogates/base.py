"""The contract of promotion surrogates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from qratk.core.evaluation import Evaluation, History, Prediction
from qratk.core.problem import Problem
from qratk.registry import Registry


@dataclass(frozen=True)
class SurrogateQuality:
    """How well scores at the highest rung are foretold, over `pairs` configurations measured at both rungs.

    `spearman` and `pearson` are of cross-validated predictions, `low_fidelity_spearman` is of the plain
    low-fidelity score; NaN where too few pairs exist.
    """

    pairs: int
    spearman: float
    pearson: float
    low_fidelity_spearman: float


class PromotionSurrogate(ABC):
    """Predicts the score at the highest rung from what a short run showed. Decides promotion, nothing else."""

    @abstractmethod
    def fit(self, problem: Problem, history: History, *, low: int, high: int) -> None:
        """Learn from the configurations measured at both numbers of steps."""

    @abstractmethod
    def predict(self, problem: Problem, evaluations: Sequence[Evaluation]) -> tuple[Prediction, ...]:
        """Predicted score at the highest rung for each evaluation at the lower one, in order."""

    @property
    @abstractmethod
    def trusted(self) -> bool:
        """Whether its ranking may be used; otherwise candidates are ranked by the measured low-fidelity score."""

    @property
    @abstractmethod
    def quality(self) -> SurrogateQuality | None:
        """Quality at the last fit; None before it."""


surrogates: Registry[PromotionSurrogate] = Registry("surrogates", "PromotionSurrogate")
