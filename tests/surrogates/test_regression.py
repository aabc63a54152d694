from __future__ import annotations

import math

import numpy as np
import pytest

from qratk.core import Evaluation, History, Importance, Problem
from qratk.core.errors import ConfigurationError
from qratk.surrogates._regression import Array, Predictor, RegressionSurrogate, rows
from qratk.surrogates.base import surrogates
from qratk.testing import toy_problem

LEARNING = ("huber", "gaussian_process", "network", "boosted_trees")


class Learns(RegressionSurrogate):
    """Keeps what it was given; predicts what `answer` says of standardised features."""

    def __init__(self, answer, **options):
        super().__init__(**{"features": "embedding", "residual": False, "min_pairs": 8, "folds": 5, **options})
        self.answer = answer
        self.given: list[tuple[Array, Array]] = []

    def _fit(self, x: Array, y: Array) -> Predictor:
        self.given.append((x, y))
        return self.answer


def history(problem: Problem, pairs: int, low, high) -> History:
    """Pairs with scores `low(configuration, rng)` after 100 steps and `high(configuration, low score)` after 900."""
    rng, found = np.random.default_rng(1), History()
    for configuration in dict.fromkeys(problem.space.random(rng) for _ in range(pairs)):
        footprint, score = problem.footprint(configuration), float(low(configuration, rng))
        found.append(Evaluation(configuration, 100, score, footprint))
        found.append(Evaluation(configuration, 900, float(high(configuration, score)), footprint))
    return found


def weighted_bits(problem: Problem):
    """Minus the rounding error by importance: what a long run shows and a short one hides."""
    share = np.array(problem.importance.bits) / sum(problem.importance.bits)
    return lambda c: -(share @ 4.0 ** -np.array(c.bits, dtype=float))


@pytest.mark.parametrize("residual", [False, True])
def test_strategies_are_given_standardised_features_and_targets(residual):
    problem = toy_problem(6)
    surrogate = Learns(lambda x: np.zeros(len(x)), residual=residual)
    surrogate.fit(
        problem, history(problem, 30, lambda c, rng: rng.normal(), lambda c, s: 3 + sum(c.bits) + s), low=100, high=900
    )
    assert len(surrogate.given) == 5 + 1
    for x, y in surrogate.given:
        np.testing.assert_allclose([x.mean(axis=0), x.std(axis=0)], [np.zeros(14), np.ones(14)], atol=1e-9)
        assert (y.mean(), y.std()) == pytest.approx((0.0, 1.0))


def test_scale_of_the_target_is_undone():
    problem = toy_problem(6)
    pairs = history(problem, 30, lambda c, rng: rng.normal(), lambda c, s: 5.0 - 2.0 * s)
    surrogate = Learns(lambda x: -x[:, 0])
    surrogate.fit(problem, pairs, low=100, high=900)
    predicted = [p.mean for p in surrogate.predict(problem, pairs.at(100))]
    np.testing.assert_allclose(predicted, [e.score for e in pairs.at(900)])


def test_residual_is_what_the_least_squares_line_leaves():
    problem = toy_problem(6)
    pairs = history(problem, 30, lambda c, rng: rng.normal(), lambda c, s: 2.0 * s + 0.05 * sum(c.ranks))
    surrogate = Learns(lambda x: np.zeros(len(x)), residual=True)
    surrogate.fit(problem, pairs, low=100, high=900)
    short, long = (np.array([e.score for e in pairs.at(steps)]) for steps in (100, 900))
    line = np.polynomial.Polynomial.fit(short, long, 1)
    predicted = [p.mean for p in surrogate.predict(problem, pairs.at(100))]
    np.testing.assert_allclose(predicted, line(short))
    left = long - line(short)
    np.testing.assert_allclose(surrogate.given[-1][1], left / left.std(), atol=1e-9)


def test_residual_surrogate_that_learns_nothing_ranks_as_short_runs_do():
    problem = toy_problem(6)
    pairs = history(problem, 30, lambda c, rng: rng.normal(), lambda c, s: s + 0.1 * sum(c.ranks))
    surrogate = Learns(lambda x: np.zeros(len(x)), residual=True)
    surrogate.fit(problem, pairs, low=100, high=900)
    asked = pairs.at(100)
    predicted = [p.mean for p in surrogate.predict(problem, asked)]
    np.testing.assert_array_equal(np.argsort(predicted), np.argsort([e.score for e in asked]))


def test_short_run_is_never_taken_for_its_opposite():
    problem = toy_problem(6)
    pairs = history(problem, 30, lambda c, rng: rng.normal(), lambda c, s: -s)
    surrogate = Learns(lambda x: np.zeros(len(x)), residual=True)
    surrogate.fit(problem, pairs, low=100, high=900)
    assert len({p.mean for p in surrogate.predict(problem, pairs.at(100))}) == 1


def test_weighted_features_sum_error_and_gain_by_importance():
    problem = toy_problem(3)
    problem = Problem(problem.shapes, problem.memory, problem.budget, Importance((1.0, 0.0, 3.0), (0.0, 2.0, 2.0)))
    configuration = problem.space.uniform(4, 8).replace(0, bits=2).replace(1, rank=16)
    evaluation = Evaluation(configuration, 100, 0.25, problem.footprint(configuration))
    row = rows(problem, [evaluation], "weighted")[0]
    error, gain = 0.25 / 16 + 0.75 / 256, 0.5 * 16 / 24 + 0.5 * 8 / 16
    np.testing.assert_allclose(row, [0.25, math.log(problem.bytes(configuration)), error, gain])
    both = rows(problem, [evaluation], "both")[0]
    np.testing.assert_array_equal(both, [*row, *problem.space.embed(configuration)])


def test_importance_of_zero_everywhere_weighs_layers_equally():
    problem = toy_problem(2)
    nothing = Problem(problem.shapes, problem.memory, problem.budget, Importance((0.0, 0.0), (0.0, 0.0)))
    equal = Problem(problem.shapes, problem.memory, problem.budget, Importance((1.0, 1.0), (2.0, 2.0)))
    evaluation = Evaluation(problem.space.smallest, 100, 0.0, problem.footprint(problem.space.smallest))
    np.testing.assert_array_equal(rows(nothing, [evaluation], "weighted"), rows(equal, [evaluation], "weighted"))


@pytest.mark.parametrize("name", LEARNING)
def test_surrogate_learns_what_short_runs_hide(name):
    problem = toy_problem(8)
    merit = weighted_bits(problem)
    surrogate = surrogates.create(name, features="weighted")
    surrogate.fit(problem, history(problem, 40, lambda c, rng: rng.normal(), lambda c, s: merit(c)), low=100, high=900)
    assert surrogate.trusted
    assert surrogate.quality.spearman > 0.8


@pytest.mark.parametrize("name", LEARNING)
def test_surrogate_is_not_trusted_when_short_runs_rank_perfectly(name):
    problem = toy_problem(8)
    surrogate = surrogates.create(name)
    surrogate.fit(problem, history(problem, 20, lambda c, rng: rng.normal(), lambda c, s: s**3), low=100, high=900)
    assert not surrogate.trusted


@pytest.mark.parametrize("options", [{"features": "psi"}, {"folds": 1}, {"min_pairs": 3}])
@pytest.mark.parametrize("name", LEARNING)
def test_senseless_options_of_the_base_are_refused(name, options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        surrogates.create(name, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("network", {"hidden": 0}),
        ("network", {"l2": 0.0}),
        ("network", {"starts": 0}),
        ("boosted_trees", {"trees": 0}),
        ("boosted_trees", {"depth": 0}),
        ("boosted_trees", {"rate": 1.5}),
        ("boosted_trees", {"leaf": 0}),
    ],
)
def test_senseless_options_of_a_strategy_are_refused(name, options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        surrogates.create(name, **options)
