"""Figures that say how far a result can be trusted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qratk.core.evaluation import Evaluation, History
from qratk.core.problem import Problem
from qratk.core.result import Comparison
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
