"""Gaussian process of tens of points, with numpy and scipy alone: a fit takes some ten milliseconds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
JITTER = 1e-8
SPREAD = 1.5
"""Standard deviation of the prior on the logarithm of each parameter: eight pairs alone cannot tell them."""


@dataclass(frozen=True)
class Process:
    """Zero-mean process with the kernel a x.x' + b Matern-5/2(|x - x'| / length) + noise.

    `logs`: the logarithms of a, b, length and noise; `weights`: K^-1 y, (n,).
    """

    x: Array
    logs: Array
    weights: Array

    def predict(self, new: Array) -> Array:
        """Posterior mean, (m,)."""
        linear, matern, _ = _kernels(new, self.x, self.logs)
        return np.asarray((linear + matern) @ self.weights)


def fit_process(x: Array, y: Array) -> Process:
    """Process whose parameters have the largest marginal likelihood times prior, for standardised x (n, d), y (n,)."""
    from scipy.optimize import minimize

    columns = x.shape[1]
    start = np.log([1.0 / columns, 0.3, np.sqrt(2 * columns), 0.3])  # the length: a typical distance of two rows

    def objective(logs: Array) -> tuple[float, Array]:
        value, gradient = log_marginal_likelihood(x, y, logs)
        away = (logs - start) / SPREAD
        return -value + 0.5 * float(away @ away), -gradient + away / SPREAD

    logs: Array = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=[(s - 7, s + 7) for s in start]).x
    return Process(x, logs, np.asarray(np.linalg.solve(_covariance(x, logs), y), dtype=np.float64))


def log_marginal_likelihood(x: Array, y: Array, logs: Array) -> tuple[float, Array]:
    """ln p(y | x) and its gradient by the logarithms of the parameters, (4,) (Rasmussen and Williams, Eq. 5.8-9)."""
    linear, matern, by_length = _kernels(x, x, logs)
    noise = float(np.exp(logs[3]))
    covariance = linear + matern + (noise + JITTER) * np.eye(len(y))
    inverse = np.linalg.inv(covariance)
    weights = inverse @ y
    value = -0.5 * (y @ weights + np.linalg.slogdet(covariance)[1] + len(y) * np.log(2 * np.pi))
    outer = np.outer(weights, weights) - inverse
    slopes = [np.sum(outer * part) for part in (linear, matern, by_length)]
    return float(value), 0.5 * np.array([*slopes, noise * np.trace(outer)])


def _covariance(x: Array, logs: Array) -> Array:
    linear, matern, _ = _kernels(x, x, logs)
    return linear + matern + (float(np.exp(logs[3])) + JITTER) * np.eye(len(x))


def _kernels(a: Array, b: Array, logs: Array) -> tuple[Array, Array, Array]:
    """Linear and Matern-5/2 part, and the latter's derivative by the logarithm of the length-scale, each (n, m)."""
    scale_linear, scale_matern, length = np.exp(logs[:3])
    squared = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T
    r = np.sqrt(5 * np.maximum(squared, 0.0)) / length
    decay = scale_matern * np.exp(-r)
    return scale_linear * (a @ b.T), decay * (1 + r + r**2 / 3), decay * r**2 * (1 + r) / 3
