"""The paper's surrogate: Huber regression with an L2 penalty on standardised features (Eq. 10)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qratk.core.errors import ConfigurationError
from qratk.core.evaluation import Evaluation, History, Prediction, SurrogateQuality
from qratk.core.problem import Problem
from qratk.surrogates._statistics import pearson, spearman
from qratk.surrogates.base import PromotionSurrogate, surrogates

Array = NDArray[np.float64]


@surrogates.register("huber")
class HuberRegression(PromotionSurrogate):
    """Predicts P(C; T_S) from [P(C; T_s), log M(C), psi(C)], minimising sum rho(residual) + l2 |theta|^2 (Eq. 10).

    Features and target are standardised over the pairs, so that `delta` and `l2` have no unit; the intercept is not
    penalised. It is trusted only while its cross-validated rank correlation beats that of P(C; T_s) itself (the
    paper's guard is the number of pairs alone).

    Args:
        delta: residual, in standard deviations of the target, beyond which the loss is linear.
        l2: the penalty, lambda.
        min_pairs: fewer pairs than this are not fitted.
        folds: of the cross-validation.
    """

    def __init__(self, delta: float = 1.0, l2: float = 1.0, min_pairs: int = 8, folds: int = 5) -> None:
        if not (delta > 0 and l2 > 0):
            raise ConfigurationError(f"delta and l2 must be positive, got {delta} and {l2}")
        if folds < 2 or min_pairs < folds:
            raise ConfigurationError(
                f"folds must be at least 2 and min_pairs at least folds, got {folds} and {min_pairs}"
            )
        self.delta = delta
        self.l2 = l2
        self.min_pairs = min_pairs
        self.folds = folds
        self._model: LinearModel | None = None
        self._std = 0.0
        self._quality: SurrogateQuality | None = None

    def fit(self, problem: Problem, history: History, *, low: int, high: int) -> None:
        """Fit to the configurations measured at both numbers of steps."""
        pairs = history.paired(low, high)
        y = np.array([b.score for _, b in pairs])
        plain = spearman([a.score for a, _ in pairs], y)
        self._model, self._std = None, 0.0
        self._quality = SurrogateQuality(len(pairs), math.nan, math.nan, plain)
        if len(pairs) < self.min_pairs:
            return
        x = features(problem, [a for a, _ in pairs])
        held_out = self._cross_validated(x, y)
        self._model = fit_huber(x, y, delta=self.delta, l2=self.l2)
        self._std = float(np.sqrt(np.mean((held_out - y) ** 2)))
        self._quality = SurrogateQuality(len(pairs), spearman(held_out, y), pearson(held_out, y), plain)

    def predict(self, problem: Problem, evaluations: Sequence[Evaluation]) -> tuple[Prediction, ...]:
        """Predicted scores; the measured low-fidelity score itself before there are enough pairs."""
        means = np.array([e.score for e in evaluations])
        ok = np.array([e.ok for e in evaluations], dtype=bool)
        if self._model is not None and ok.any():
            means[ok] = self._model.predict(features(problem, [e for e in evaluations if e.ok]))
        return tuple(
            Prediction(e.configuration, float(mean), self._std) for e, mean in zip(evaluations, means, strict=True)
        )

    @property
    def trusted(self) -> bool:
        """Whether there are enough pairs, and predictions rank them better than the low-fidelity score does."""
        quality = self._quality
        if self._model is None or quality is None or math.isnan(quality.spearman):
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
            model = fit_huber(x[fold != k], y[fold != k], delta=self.delta, l2=self.l2)
            held_out[fold == k] = model.predict(x[fold == k])
        return held_out


def features(problem: Problem, evaluations: Sequence[Evaluation]) -> Array:
    """Rows [P(C; T_s), log M(C), psi(C)], (n, 2 + 2L)."""
    rows = [
        np.concatenate([[e.score, math.log(problem.bytes(e.configuration))], problem.space.embed(e.configuration)])
        for e in evaluations
    ]
    return np.array(rows, dtype=np.float64)


@dataclass(frozen=True)
class LinearModel:
    """A linear predictor on features standardised by the training pairs; the target's scale is undone."""

    mean: Array  # (d,)
    scale: Array  # (d,)
    coefficients: Array  # (d,), on standardised features and target
    intercept: float  # of the standardised target
    target_mean: float
    target_scale: float

    def predict(self, x: Array) -> Array:
        """Predicted target, (n,)."""
        standardised = (x - self.mean) / self.scale
        return self.target_mean + self.target_scale * (standardised @ self.coefficients + self.intercept)


def fit_huber(x: Array, y: Array, *, delta: float, l2: float) -> LinearModel:
    """The minimiser of Eq. 10 for features x (n, d) and target y (n,).

    The coefficients that minimise it lie in the span of the rows, so the problem is solved in the at most n
    coordinates of a thin singular value decomposition: L = 10,000 layers cost no more than the pairs there are.
    """
    mean, scale = x.mean(axis=0), _nonzero(x.std(axis=0))
    target_mean, target_scale = float(y.mean()), float(_nonzero(y.std()))
    u, s, vt = np.linalg.svd((x - mean) / scale, full_matrices=False)
    theta, intercept = _minimise(u * s, (y - target_mean) / target_scale, delta=delta, l2=l2)
    return LinearModel(mean, scale, vt.T @ theta, intercept, target_mean, target_scale)


def _minimise(z: Array, t: Array, *, delta: float, l2: float) -> tuple[Array, float]:
    """Coefficients and intercept that minimise sum rho(z theta + b - t) + l2 |theta|^2: convex and smooth."""
    from scipy.optimize import minimize

    def objective(parameters: Array) -> tuple[float, Array]:
        theta, intercept = parameters[:-1], parameters[-1]
        residual = z @ theta + intercept - t
        inner = np.clip(residual, -delta, delta)  # rho' ; rho = inner * (residual - inner / 2)
        value = float(np.sum(inner * (residual - inner / 2)) + l2 * theta @ theta)
        return value, np.append(z.T @ inner + 2 * l2 * theta, inner.sum())

    start = np.zeros(z.shape[1] + 1)
    solution = minimize(
        objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 5000, "ftol": 1e-15, "gtol": 1e-9}
    ).x
    return solution[:-1], float(solution[-1])


def _nonzero(scale: NDArray[np.float64] | np.floating) -> Array:
    """The scale, and 1 where it vanishes: a constant feature then standardises to 0 instead of NaN."""
    return np.where(np.asarray(scale) > 1e-12, scale, 1.0)
