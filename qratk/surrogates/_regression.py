"""What regression surrogates share: pairs, features, cross-validation, and the guard that decides whether to trust."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from qratk.core.configuration import Configuration
from qratk.core.correlation import pearson, spearman
from qratk.core.errors import ConfigurationError
from qratk.core.evaluation import Evaluation, History, Prediction, SurrogateQuality
from qratk.core.problem import Problem
from qratk.surrogates.base import PromotionSurrogate

Array = NDArray[np.float64]
Predictor = Callable[[Array], Array]
"""From rows of features (n, d) to targets (n,)."""
Features = Literal["embedding", "weighted", "both"]


class RegressionSurrogate(PromotionSurrogate):
    """Learns P(C; T_S) from pairs of a short and a long run; a strategy says how, in `_fit`.

    It is trusted only while its cross-validated rank correlation beats that of P(C; T_s) itself (the paper's guard is
    the number of pairs alone).

    Args:
        features: what stands beside the score and the bytes; see `rows`.
        residual: learn what the line through the pairs' scores leaves over, in place of the score itself. Where little
            is learnt, the ranking is then that of the short runs.
        min_pairs: fewer pairs than this are not fitted.
        folds: of the cross-validation.
    """

    def __init__(self, *, features: Features, residual: bool, min_pairs: int, folds: int) -> None:
        if features not in get_args(Features):
            raise ConfigurationError(f"features must be one of {get_args(Features)}, got {features!r}")
        if folds < 2 or min_pairs < folds:
            raise ConfigurationError(
                f"folds must be at least 2 and min_pairs at least folds, got {folds} and {min_pairs}"
            )
        self.features: Features = features
        self.residual = residual
        self.min_pairs = min_pairs
        self.folds = folds
        self._predictor: Predictor | None = None
        self._std = 0.0
        self._quality: SurrogateQuality | None = None

    @abstractmethod
    def _fit(self, x: Array, y: Array) -> Predictor:
        """Predictor learnt from features x (n, d) and targets y (n,), all standardised over the n pairs.

        The first column is the score of the short run, the second the logarithm of the bytes. The same arguments must
        give the same predictor.
        """

    def fit(self, problem: Problem, history: History, *, low: int, high: int) -> None:
        """Fit to the configurations measured at both numbers of steps."""
        pairs = history.paired(low, high)
        y = np.array([b.score for _, b in pairs])
        plain = spearman([a.score for a, _ in pairs], y)
        self._predictor, self._std = None, 0.0
        self._quality = SurrogateQuality(len(pairs), math.nan, math.nan, plain)
        if len(pairs) < self.min_pairs:
            return
        x = rows(problem, [a for a, _ in pairs], self.features)
        held_out = self._cross_validated(x, y)
        self._predictor = self._learn(x, y)
        self._std = float(np.sqrt(np.mean((held_out - y) ** 2)))
        self._quality = SurrogateQuality(len(pairs), spearman(held_out, y), pearson(held_out, y), plain)

    def predict(self, problem: Problem, evaluations: Sequence[Evaluation]) -> tuple[Prediction, ...]:
        """Predicted scores; the measured low-fidelity score itself before there are enough pairs."""
        means = np.array([e.score for e in evaluations])
        ok = np.array([e.ok for e in evaluations], dtype=bool)
        if self._predictor is not None and ok.any():
            means[ok] = self._predictor(rows(problem, [e for e in evaluations if e.ok], self.features))
        return tuple(
            Prediction(e.configuration, float(mean), self._std) for e, mean in zip(evaluations, means, strict=True)
        )

    @property
    def trusted(self) -> bool:
        """Whether there are enough pairs, and predictions rank them better than the low-fidelity score does."""
        quality = self._quality
        if self._predictor is None or quality is None or math.isnan(quality.spearman):
            return False
        plain = quality.low_fidelity_spearman
        return quality.spearman > (0.0 if math.isnan(plain) else plain)

    @property
    def quality(self) -> SurrogateQuality | None:
        """Cross-validated quality at the last fit."""
        return self._quality

    def _cross_validated(self, x: Array, y: Array) -> Array:
        """Prediction of each pair by a model that has not seen it; pairs are dealt to the folds in turn."""
        fold = np.arange(len(y)) % self.folds
        held_out = np.empty(len(y))
        for k in range(self.folds):
            held_out[fold == k] = self._learn(x[fold != k], y[fold != k])(x[fold == k])
        return held_out

    def _learn(self, x: Array, y: Array) -> Predictor:
        """Predictor on raw features and target: standardises both, and takes the line off first if so asked."""
        slope = _slope(x[:, 0], y) if self.residual else 0.0
        left = y - slope * x[:, 0]
        mean, scale = x.mean(axis=0), nonzero(x.std(axis=0))
        target_mean, target_scale = float(left.mean()), float(left.std())
        if not target_scale > 1e-12:  # nothing is left to learn
            return lambda new: np.asarray(target_mean + slope * new[:, 0])
        predictor = self._fit((x - mean) / scale, (left - target_mean) / target_scale)

        def predict(new: Array) -> Array:
            return target_mean + target_scale * predictor((new - mean) / scale) + slope * new[:, 0]

        return predict


def rows(problem: Problem, evaluations: Sequence[Evaluation], features: Features = "embedding") -> Array:
    """Features of evaluations, (n, d): P(C; T_s) and log M(C), and beside them

    - embedding: psi(C), 2L numbers (Eq. 10);
    - weighted: how much sensitivity meets rounding and how much gradient meets rank, two numbers: the sum over layers
      of I_q(l) 4^-b_l and of I_r(l) r_l / (r_l + r_max / 2), each importance divided by its sum; and shared settings as
      in psi;
    - both: these two, then psi.
    """
    beside: dict[Features, list[Callable[[Configuration], Array]]] = {
        "embedding": [problem.space.embed],
        "weighted": [lambda c: _weighted(problem, c), problem.space.embed_shared],
        "both": [lambda c: _weighted(problem, c), problem.space.embed],
    }
    found = [
        np.concatenate(
            [[e.score, math.log(problem.bytes(e.configuration))], *(part(e.configuration) for part in beside[features])]
        )
        for e in evaluations
    ]
    return np.array(found, dtype=np.float64)


def _weighted(problem: Problem, configuration: Configuration) -> Array:
    bits, ranks = np.array(configuration.bits, dtype=np.float64), np.array(configuration.ranks, dtype=np.float64)
    sensitivity, learnable = (np.asarray(s) for s in (problem.importance.bits, problem.importance.rank))
    error = _share(sensitivity) @ 4.0**-bits
    gain = _share(learnable) @ (ranks / (ranks + max(problem.space.ranks[-1], 1) / 2))
    return np.array([error, gain])


def _share(scores: Array) -> Array:
    total = float(scores.sum())
    return scores / total if total > 0 else np.full(len(scores), 1 / len(scores))


def _slope(x: Array, y: Array) -> float:
    """Slope of the least-squares line of y on x, not below 0: a short run is never taken for its opposite."""
    centred = x - x.mean()
    spread = float(centred @ centred)
    return max(0.0, float(centred @ y) / spread) if spread > 1e-24 else 0.0


def nonzero(scale: NDArray[np.float64] | np.floating) -> Array:
    """The scale, and 1 where it vanishes: a constant feature then standardises to 0 instead of NaN."""
    return np.where(np.asarray(scale) > 1e-12, scale, 1.0)
