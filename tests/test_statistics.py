"""Intervals and hit rates against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qratk.core import Configuration, Evaluation, Footprint, History
from qratk.loop.statistics import hierarchical_interval, mean_interval, paired_comparison, top3_hit_rates
from qratk.surrogates.base import surrogates
from qratk.testing import toy_problem

FOOTPRINT = Footprint(1, 0, 0, 0, 1, 1)


def evaluation(outcomes: np.ndarray, weights: np.ndarray | None = None, steps: int = 10) -> Evaluation:
    score = float(np.average(outcomes, weights=weights))
    return Evaluation(Configuration.uniform(4, 8, 2), steps, score, FOOTPRINT, tuple(outcomes.tolist()))


def test_the_interval_of_a_constant_difference_is_that_difference() -> None:
    theirs = np.random.default_rng(0).normal(size=50)
    comparison = paired_comparison(evaluation(theirs + 0.25), evaluation(theirs))
    assert (comparison.low, comparison.high) == (pytest.approx(0.25), pytest.approx(0.25))


def test_the_interval_has_the_width_that_the_normal_law_foretells() -> None:
    rng = np.random.default_rng(1)
    theirs, gain = rng.normal(size=400), rng.normal(loc=0.1, scale=0.5, size=400)
    comparison = paired_comparison(evaluation(theirs + gain), evaluation(theirs))
    half = 1.96 * gain.std() / math.sqrt(400)
    assert comparison.difference == pytest.approx(gain.mean())
    assert comparison.low == pytest.approx(gain.mean() - half, abs=0.15 * half)
    assert comparison.high == pytest.approx(gain.mean() + half, abs=0.15 * half)


def test_items_weigh_in_the_interval_as_in_the_score() -> None:
    weights = np.array([1.0] * 20 + [1e9])
    ours, theirs = np.append(np.zeros(20), 5.0), np.zeros(21)
    heavy = paired_comparison(evaluation(ours, weights), evaluation(theirs, weights), weights=weights.tolist())
    assert heavy.high == pytest.approx(5.0)  # whenever the heavy item is drawn, it decides
    assert paired_comparison(evaluation(ours), evaluation(theirs)).high < 1.0


def test_without_outcomes_of_the_same_items_there_is_no_interval() -> None:
    comparison = paired_comparison(evaluation(np.ones(3)), evaluation(np.ones(4)))
    assert math.isnan(comparison.low)
    assert math.isnan(comparison.high)


def pairs(low_noise: float, count: int) -> History:
    problem, rng = toy_problem(4), np.random.default_rng(2)
    found: dict[Configuration, float] = {}
    while len(found) < count:
        found[problem.space.random(rng)] = float(rng.normal())
    history = History()
    for configuration, truth in found.items():
        history.append(Evaluation(configuration, 1, truth + low_noise * float(rng.normal()), FOOTPRINT))
        history.append(Evaluation(configuration, 9, truth, FOOTPRINT))
    return history


def test_short_runs_that_rank_perfectly_hit_all_of_the_top_three() -> None:
    rates = top3_hit_rates(surrogates.create("none"), toy_problem(4), pairs(0.0, 20), low=1, high=9)
    assert rates["low_fidelity"] == pytest.approx(1.0)


def test_short_runs_that_say_nothing_hit_as_often_as_chance() -> None:
    rates = top3_hit_rates(surrogates.create("none"), toy_problem(4), pairs(1e6, 200), low=1, high=9, trials=2000)
    assert rates["low_fidelity"] == pytest.approx(0.3, abs=0.06)  # three of ten


def test_too_few_pairs_give_no_rates() -> None:
    assert top3_hit_rates(surrogates.create("huber"), toy_problem(4), pairs(0.1, 9), low=1, high=9) == {}


def test_interval_of_a_mean_covers_it_as_often_as_promised():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        low, high = mean_interval(rng.normal(1.0, 2.0, size=30), samples=500)
        covered += low <= 1.0 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_interval_of_one_value_is_unknown():
    assert all(np.isnan(mean_interval([1.0])))


def test_interval_over_groups_is_that_of_their_means_where_items_are_equal():
    means = [0.1, 0.4, 0.2, 0.9]
    found = hierarchical_interval([[mean] * 5 for mean in means], samples=20_000)
    assert found == pytest.approx(mean_interval(means, samples=20_000), abs=0.02)


def test_interval_of_one_group_is_that_of_its_items():
    items = np.random.default_rng(1).normal(size=200)
    found = hierarchical_interval([items], samples=20_000)
    assert found == pytest.approx(mean_interval(items, samples=20_000), abs=0.01)


def test_items_widen_the_interval_over_groups():
    rng = np.random.default_rng(2)
    groups = [rng.normal(mean, 3.0, size=20) for mean in (0.0, 0.5, 1.0, 1.5)]
    low, high = hierarchical_interval(groups)
    inner = mean_interval([float(group.mean()) for group in groups])
    assert high - low > 1.1 * (inner[1] - inner[0])


def test_interval_over_groups_weighs_items():
    groups = [[0.0, 1.0]] * 6
    heavy = hierarchical_interval(groups, [[1.0, 1000.0]] * 6)
    light = hierarchical_interval(groups, [[1000.0, 1.0]] * 6)
    assert np.mean(heavy) > 0.6 > 0.4 > np.mean(light)


@pytest.mark.parametrize("groups", [[], [[1.0], []]])
def test_interval_without_items_is_unknown(groups):
    assert all(np.isnan(hierarchical_interval(groups)))
