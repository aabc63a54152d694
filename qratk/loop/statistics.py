"""Figures that say how far a result can be trusted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qratk.core.evaluation import Evaluation, History
from qratk.core.problem import Problem
from qratk.core.result import Comparison, Confirmed
from qratk.surrogates.base import PromotionSurrogate


def paired_comparison(
    best: Evaluation,
    baseline: Evaluation,
    *,
    weights: Sequence[float] | None = None,
    samples: int = 2000,
    confidence: float = 0.95,
) -> Comparison:
    """Difference in score of two evaluations on the same items, with a paired percentile bootstrap interval.

    Items are drawn with replacement, the same for both, from a generator of its own; `weights` (N,) are those of the
    items in the score. Without outcomes the interval is NaN.
    """
    difference = best.score - baseline.score
    ours, theirs = np.asarray(best.outcomes), np.asarray(baseline.outcomes)
    if not best.ok or not baseline.ok or ours.size == 0 or ours.shape != theirs.shape:
        return Comparison(baseline, difference, float("nan"), float("nan"), confidence)
    item_weights = np.ones(ours.size) if weights is None else np.asarray(weights, dtype=np.float64)
    draws = np.random.default_rng(0).multinomial(ours.size, np.full(ours.size, 1 / ours.size), size=samples)
    drawn_weights = draws * item_weights
    totals = drawn_weights.sum(axis=1)
    means = (drawn_weights @ (ours - theirs))[totals > 0] / totals[totals > 0]
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Comparison(baseline, difference, float(low), float(high), confidence)


def mean_interval(values: Sequence[float], *, samples: int = 10_000, confidence: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean, as of differences paired by seed; NaN with fewer than two values."""
    array = np.asarray(values, dtype=np.float64)
    if array.size < 2:
        return float("nan"), float("nan")
    draws = np.random.default_rng(0).integers(array.size, size=(samples, array.size))
    return _quantiles(array[draws].mean(axis=1), confidence)


def mean_over_seeds(values: Sequence[float], *, confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean of scores of equal runs with different seeds, and its interval by Student's t; NaN where there is none.

    Of three values a bootstrap would be narrower than it says; that of Student holds for any number of normal ones
    (Student 1908): m +- t(n - 1) s / sqrt(n).
    """
    from scipy.special import stdtrit

    array = np.asarray(values, dtype=np.float64)
    if array.size < 2:
        return float(array.mean()) if array.size else float("nan"), float("nan"), float("nan")
    mean, error = float(array.mean()), float(array.std(ddof=1)) / array.size**0.5
    half = float(stdtrit(array.size - 1, (1 + confidence) / 2)) * error
    return mean, mean - half, mean + half


def seed_comparison(best: Confirmed, baseline: Confirmed, *, confidence: float = 0.95) -> Comparison | None:
    """Mean difference in score by the seeds that both were run with, and its interval over these; None without any."""
    theirs = {e.replicate: e.score for e in baseline.replicates if e.ok}
    differences = [e.score - theirs[e.replicate] for e in best.replicates if e.ok and e.replicate in theirs]
    if not differences:
        return None
    return Comparison(baseline.selected, *mean_over_seeds(differences, confidence=confidence), confidence, over="seeds")


def hierarchical_interval(
    groups: Sequence[Sequence[float]],
    weights: Sequence[Sequence[float] | None] | None = None,
    *,
    samples: int = 2000,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Bootstrap interval of the mean over groups of their weighted means, drawing groups and then items within them.

    A group holds the paired differences of one seed, item by item. Both the seeds and the items are then a sample of
    what could have been drawn (Davison and Hinkley 1997, section 3.8). NaN without items.
    """
    arrays = [np.asarray(group, dtype=np.float64) for group in groups]
    if not arrays or any(array.size == 0 for array in arrays):
        return float("nan"), float("nan")
    rng = np.random.default_rng(0)
    means = np.empty((len(arrays), samples))
    for row, array in enumerate(arrays):
        given = None if weights is None else weights[row]
        item_weights = np.ones(array.size) if given is None else np.asarray(given, dtype=np.float64)
        counts = rng.multinomial(array.size, np.full(array.size, 1 / array.size), size=samples) * item_weights
        totals = counts.sum(axis=1)
        means[row] = np.where(totals > 0, counts @ array / np.where(totals > 0, totals, 1), array.mean())
    # One row of means is not drawn twice: a seed that comes up twice brings another draw of its items.
    chosen = rng.integers(len(arrays), size=(samples, len(arrays)))
    drawn = means[chosen, rng.integers(samples, size=chosen.shape)]
    return _quantiles(drawn.mean(axis=1), confidence)


def _quantiles(values: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def top3_hit_rates(
    surrogate: PromotionSurrogate,
    problem: Problem,
    history: History,
    *,
    low: int,
    high: int,
    group: int = 10,
    trials: int = 200,
) -> dict[str, float]:
    """Share of the true top three that a ranking of `group` pairs finds, by surrogate and by short runs (Fig. 4).

    Every prediction comes from a fit on four other fifths of the pairs. Empty with fewer pairs than a group.
    """
    pairs = history.paired(low, high)
    if len(pairs) < group:
        return {}
    rng = np.random.default_rng(0)
    low_scores = np.array([a.score for a, _ in pairs])
    truth = np.array([b.score for _, b in pairs])
    predicted = _cross_predicted(surrogate, problem, pairs, rng.permutation(len(pairs)) % 5, low, high)
    hits = {"surrogate": 0.0, "low_fidelity": 0.0}
    for _ in range(trials):
        chosen = rng.choice(len(pairs), size=group, replace=False)
        for name, ranking in (("surrogate", predicted), ("low_fidelity", low_scores)):
            hits[name] += len(_top3(ranking, chosen) & _top3(truth, chosen)) / 3
    return {"pairs": float(len(pairs)), **{name: value / trials for name, value in hits.items()}}


def _cross_predicted(
    surrogate: PromotionSurrogate,
    problem: Problem,
    pairs: Sequence[tuple[Evaluation, Evaluation]],
    folds: NDArray[np.int64],
    low: int,
    high: int,
) -> NDArray[np.float64]:
    predicted = np.array([a.score for a, _ in pairs])
    for fold in np.unique(folds):
        held = np.flatnonzero(folds == fold).tolist()
        others = [pairs[i] for i in np.flatnonzero(folds != fold).tolist()]
        surrogate.fit(problem, History(e for pair in others for e in pair), low=low, high=high)
        if surrogate.quality is not None and np.isfinite(surrogate.quality.spearman):
            guesses = surrogate.predict(problem, [pairs[i][0] for i in held])
            predicted[held] = [guess.mean for guess in guesses]
    return predicted


def _top3(scores: NDArray[np.float64], among: NDArray[np.int64]) -> set[int]:
    return set(among[np.argsort(-scores[among], kind="stable")[:3]].tolist())
