"""A model of the score as a sum over layers, and the configurations that it thinks best under the budget.

    score_T(C) = c_T - A_T sum_l q_l (1 + x_l) e(b_l) + B_T sum_l r_l (1 + y_l) h(r_l) + sum_s z_s(v_s) + z_{s,T}(v_s)

q and r are the importances I_q and I_r, each as shares of their sum; e(b) = 4^(-k (b - b_1)) is the error of rounding
relative to the lowest rung, h(r) = 1 - exp(-r / p) what an adapter of that rank can do. Given k and p, everything
enters linearly: A and B differ a little from rung to rung, the corrections x and y are common to all rungs, so that
short runs teach what matters where. Each value v of a shared setting s has a worth of its own, z, and a smaller one
at each rung. All have Gaussian priors; k, p and the spread of x and y are weighed on a grid by
marginal likelihood (Bayesian linear regression).

The best configuration of a draw from the posterior (Thompson sampling) is a multiple-choice knapsack.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qratk.core.evaluation import History
from qratk.core.problem import Problem
from qratk.core.shared import Shared

Array = NDArray[np.float64]

DECAYS = (0.3, 0.5, 0.75, 1.0)
RANK_SCALES = (4.0, 10.0)
SPREADS = (0.3, 0.7, 1.5)
NOISES = (0.1, 0.3, 1.0)  # standard deviations, relative to that of the scores at a rung
DRIFT = (0.3, 0.5)  # of A and B from rung to rung, relative to their common values
SETTINGS = (1.0, 0.3)  # of z and of what a rung adds to it, relative to the scores at the lowest rung
MINIMUM = 8


@dataclass(frozen=True)
class Curves:
    """How the error falls with the bits, k (`decay`), and over how many ranks an adapter gains, p (`rank_scale`)."""

    decay: float
    rank_scale: float

    def error(self, problem: Problem, bits: Array) -> Array:
        """e(b)."""
        return np.asarray(4.0 ** (-self.decay * (bits - problem.space.bits[0])))

    def gain(self, ranks: Array) -> Array:
        """h(r)."""
        return np.asarray(1 - np.exp(-ranks / self.rank_scale))


@dataclass(frozen=True)
class Posterior:
    """Gaussian over A and B at the highest rung, A q x (L,), B r y (L,) and z (S'), for one set of curves and spread.

    Kept as the regression itself, in coefficients w with a standard normal prior: `design` (n, d), `noise` (n,) their
    standard deviations, `root` (n, n) the Cholesky factor of the covariance of the scores, `target` (n,).
    """

    curves: Curves
    design: Array
    noise: Array
    root: Array
    target: Array
    select: Array
    slopes: Array
    log_likelihood: float

    def draw(self, rng: np.random.Generator | None) -> Array:
        """A draw of the coefficients at the highest rung, or their mean (Matheron's rule)."""
        prior = np.zeros(self.design.shape[1]) if rng is None else rng.standard_normal(self.design.shape[1])
        noise = 0.0 if rng is None else self.noise * rng.standard_normal(len(self.noise))
        surprise = self.target - self.design @ prior - noise
        solved = np.linalg.solve(self.root.T, np.linalg.solve(self.root, surprise))
        return np.asarray(self.select @ (prior + self.design.T @ solved))


class AdditiveModel:
    """Fitted to all that was measured; see the module's docstring.

    Raises nothing: `ready` says whether there was enough to fit.
    """

    def __init__(self, problem: Problem, history: History, steps: Sequence[int]) -> None:
        self.problem = problem
        self.shares = tuple(_shares(scores) for scores in (problem.importance.bits, problem.importance.rank))
        self.groups = [(rung, history.at(rung)) for rung in steps]
        self.groups = [(rung, found) for rung, found in self.groups if len(found) > 1]
        self.posteriors: list[Posterior] = []
        if sum(len(found) for _, found in self.groups) >= MINIMUM:
            self._fit()

    @property
    def ready(self) -> bool:
        """Whether anything was fitted."""
        return bool(self.posteriors)

    @property
    def weights(self) -> Array:
        """Posterior probabilities of the curves and spreads on the grid."""
        logs = np.array([posterior.log_likelihood for posterior in self.posteriors])
        weights = np.exp(logs - logs.max())
        return np.asarray(weights / weights.sum())

    def values(self, rng: np.random.Generator | None = None) -> Array:
        """What each choice of each layer adds to the score at the highest rung, (L, bits, ranks): that of `drawn`."""
        return self.drawn(rng)[0]

    def drawn(self, rng: np.random.Generator | None = None) -> tuple[Array, Shared]:
        """What each choice of each layer adds to the score at the highest rung, (L, bits, ranks), and best settings.

        A draw from the posterior, or without `rng` its most likely mean.
        """
        weights = self.weights
        which = int(weights.argmax()) if rng is None else int(rng.choice(len(weights), p=weights))
        posterior = self.posteriors[which]
        drawn, size = posterior.draw(rng), self.problem.num_layers
        slope, rise = np.maximum(posterior.slopes + drawn[:2], 0.1 * posterior.slopes)
        bits, rank, worth = np.split(drawn[2:], [size, 2 * size])
        # More bits and higher ranks never hurt for good: a layer keeps at least a twentieth of its prior weight.
        bits = np.maximum(self.shares[0] * slope + bits, 0.05 * slope * self.shares[0])
        rank = np.maximum(self.shares[1] * rise + rank, 0.05 * rise * self.shares[1])
        space = self.problem.space
        error = posterior.curves.error(self.problem, np.array(space.bits, dtype=float))
        gain = posterior.curves.gain(np.array(space.ranks, dtype=float))
        values = -bits[:, None, None] * error[None, :, None] + rank[:, None, None] * gain[None, None, :]
        return np.asarray(values), self._best_shared(worth)

    def _best_shared(self, worth: Array) -> Shared:
        """The settings of largest worth, of those of all values one after another, (S',)."""
        ladders = self.problem.space.shared
        parts = np.split(worth, np.cumsum([len(ladder.values) for ladder in ladders])[:-1]) if ladders else []
        return self.problem.space.shared_at([int(part.argmax()) for part in parts])

    def _settings(self) -> Array:
        """Which value each setting has in each measurement, one-hot, (n, S'): empty without shared settings."""
        space = self.problem.space
        configurations = [e.configuration for _, found in self.groups for e in found]
        places = np.array([space.shared_indices(c) for c in configurations]).reshape(len(configurations), -1)
        columns = [np.eye(len(ladder.values))[places[:, s]] for s, ladder in enumerate(space.shared)]
        return np.concatenate([np.zeros((len(configurations), 0)), *columns], axis=1)

    # Fitting

    def _fit(self) -> None:
        scale = max(float(np.std([e.score for e in self.groups[0][1]])), 1e-12)
        targets = [np.array([e.score for e in found]) / scale for _, found in self.groups]
        centre = [float(target.mean()) for target in targets]
        y = np.concatenate([target - mean for target, mean in zip(targets, centre, strict=True)])
        rung = np.concatenate([np.full(len(found), number) for number, (_, found) in enumerate(self.groups)])
        bits = np.array([e.configuration.bits for _, found in self.groups for e in found], dtype=float)
        ranks = np.array([e.configuration.ranks for _, found in self.groups for e in found], dtype=float)
        for decay, rank_scale in itertools.product(DECAYS, RANK_SCALES):
            curves = Curves(decay, rank_scale)
            error, gain = curves.error(self.problem, bits), curves.gain(ranks)
            common = np.stack([np.ones(len(y)), -error @ self.shares[0], gain @ self.shares[1]], axis=1)
            self._fit_curves(curves, y, rung, common, error, gain, self._settings())

    def _fit_curves(
        self,
        curves: Curves,
        y: Array,
        rung: NDArray[np.int64],
        common: Array,
        error: Array,
        gain: Array,
        settings: Array,
    ) -> None:
        """Add the posteriors of one set of curves: for each spread of the corrections that of the likeliest noise."""
        rungs = int(rung.max()) + 1
        at = [rung == number for number in range(rungs)]
        noise = np.array([float(np.std(y[here])) or 1.0 for here in at])[rung]
        slopes = self._slopes(common, y, 0.3 * noise)
        drifts = slopes * np.array(DRIFT)
        constants = np.stack([here.astype(float) for here in at], axis=1)
        here = [np.where(mask[:, None], common[:, 1:], 0.0) for mask in at]
        corrections = [-slopes[0] * self.shares[0] * error, slopes[1] * self.shares[1] * gain]
        worth = [settings, *(np.where(mask[:, None], settings, 0.0) for mask in at)]
        design = np.concatenate([constants, common[:, 1:], *here, *corrections, *worth], axis=1)
        worth_sds = np.repeat(SETTINGS, np.array([1, rungs]) * settings.shape[1])
        left = y - common[:, 1:] @ slopes
        for spread in SPREADS:
            sds = np.concatenate(
                [np.full(rungs, 3.0), drifts, np.tile(drifts, rungs), np.full(2 * len(error.T), spread), worth_sds]
            )
            found = [self._posterior(curves, design * sds, noise * level, left, rungs, slopes, sds) for level in NOISES]
            self.posteriors.append(max(found, key=lambda posterior: posterior.log_likelihood))

    def _slopes(self, common: Array, y: Array, noise: Array) -> Array:
        """Common A and B without corrections: everything else is relative to them."""
        widths = _unit_widths(common)
        scaled = common / noise[:, None]
        solution = np.linalg.solve(scaled.T @ scaled + np.diag((widths / 3) ** 2), scaled.T @ (y / noise))
        return np.asarray(np.maximum(solution[1:], 0.1 / widths[1:]))

    def _posterior(
        self, curves: Curves, scaled: Array, noise: Array, y: Array, rungs: int, slopes: Array, sds: Array
    ) -> Posterior:
        root = np.asarray(np.linalg.cholesky(scaled @ scaled.T + np.diag(noise**2)), dtype=np.float64)
        residual = np.linalg.solve(root, y)
        log_likelihood = -0.5 * float(residual @ residual) - float(np.log(np.diag(root)).sum())
        select = self._at_highest(scaled.shape[1], rungs, slopes) * sds
        return Posterior(curves, scaled, noise, root, y, select, slopes, log_likelihood)

    def _at_highest(self, width: int, rungs: int, slopes: Array) -> Array:
        """Matrix from all coefficients to what A and B differ from `slopes` at the highest rung, A q x, B r y and z."""
        size, values = self.problem.num_layers, sum(len(ladder.values) for ladder in self.problem.space.shared)
        select = np.zeros((2 + 2 * size + values, width))
        rows = np.arange(2)
        select[rows, rungs + rows] = select[rows, rungs + 2 * rungs + rows] = 1.0
        start = rungs + 2 + 2 * rungs
        rows = np.arange(size)
        select[2 + rows, start + rows] = slopes[0] * self.shares[0]
        select[2 + size + rows, start + size + rows] = slopes[1] * self.shares[1]
        start, rows = start + 2 * size, np.arange(values)
        select[2 + 2 * size + rows, start + rows] = select[2 + 2 * size + rows, start + rungs * values + rows] = 1.0
        return select


def _unit_widths(common: Array) -> Array:
    """Standard deviation of each column, 1 for those that do not vary."""
    widths = common.std(axis=0)
    return np.where(widths > 1e-9, widths, 1.0)


def _shares(scores: Sequence[float]) -> Array:
    values = np.asarray(scores, dtype=np.float64)
    total = float(values.sum())
    return values / total if total > 0 else np.full(len(values), 1 / len(values))
