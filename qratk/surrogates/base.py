"""The contract of promotion surrogates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from qratk.core.evaluation import Evaluation, History, Prediction, SurrogateQuality
from qratk.core.problem import Problem
from qratk.registry import Registry


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
