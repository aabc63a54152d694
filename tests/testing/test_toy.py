from __future__ import annotations

import itertools

import numpy as np
import pytest

from qratk.components import REGISTRIES
from qratk.core import Configuration, ConfigurationError, FidelityLadder, Request
from qratk.core.evaluation import Candidate
from qratk.estimators.base import ImportanceEstimator
from qratk.evaluators.base import EvaluationContext
from qratk.evaluators.landscape import LandscapeOptions
from qratk.testing import ToyEvaluator, ToyLandscape, toy_problem


def test_bit_step_takes_about_forty_rank_steps():
    problem = toy_problem(8)
    bits, ranks = problem.table("bits"), problem.table("rank")
    ratio = (bits[:, 1] - bits[:, 0]) / (ranks[:, 1] - ranks[:, 0])
    assert 30 < ratio.min() < ratio.max() < 60


def test_score_is_the_mean_of_the_outcomes():
    evaluator = ToyEvaluator(4)
    evaluation = evaluator.measure(evaluator.problem().space.uniform(4, 8), 300)
    assert len(evaluation.outcomes) == 32
    assert evaluation.score == pytest.approx(np.mean(evaluation.outcomes), abs=1e-12)


def test_evaluations_do_not_depend_on_order_or_instance():
    problem = toy_problem(4)
    requests = [Request(Candidate(c, "test"), steps) for c in problem.space.uniforms() for steps in (100, 900)]
    forth = list(ToyEvaluator(4).evaluate(requests))
    back = list(ToyEvaluator(4).evaluate(requests[::-1]))
    assert forth == back[::-1]


def test_optimum_agrees_with_an_unvectorised_search():
    evaluator = ToyEvaluator(2, seed=3)
    problem = evaluator.problem(like=(4, 8))
    layers = [c.layers[0] for c in problem.space.uniforms()]
    every = [Configuration(pair) for pair in itertools.product(layers, repeat=2)]
    best = max(
        (c for c in every if problem.feasible(c)),
        key=lambda c: (evaluator.landscape.true_score(c, 900), -problem.bytes(c)),
    )
    found, score = evaluator.optimum(problem.space, problem.budget)
    assert found == best
    assert score == pytest.approx(evaluator.landscape.true_score(best, 900))


def test_optimum_holds_the_cap_on_average_bits():
    evaluator = ToyEvaluator(3)
    problem = evaluator.problem(like=(8, 16), max_average_bits=3.5)
    found, _ = evaluator.optimum(problem.space, problem.budget)
    assert problem.feasible(found)


def test_brute_force_over_too_much_is_refused():
    evaluator = ToyEvaluator(12)
    problem = evaluator.problem()
    with pytest.raises(ConfigurationError, match="too many for brute force"):
        evaluator.optimum(problem.space, problem.budget)


def test_more_bits_and_more_steps_never_hurt_without_noise():
    landscape = ToyLandscape(4, seed=1)
    rng = np.random.default_rng(0)
    space = toy_problem(4).space
    for _ in range(50):
        configuration = space.random(rng)
        scores = [landscape.true_score(configuration, steps) for steps in (100, 300, 900)]
        assert scores == sorted(scores)
        for layer in range(4):
            higher = space.step(configuration, layer, "bits", 1)
            if higher is not None:
                assert landscape.true_score(higher, 900) > scores[-1]


def test_short_runs_prefer_small_ranks_more_than_long_runs_do():
    landscape, space = ToyLandscape(6), toy_problem(6).space
    gain = {
        steps: landscape.true_score(space.uniform(4, 16), steps) - landscape.true_score(space.uniform(4, 8), steps)
        for steps in (100, 900)
    }
    assert gain[100] < gain[900]


def test_noise_has_the_stated_size_and_shrinks_with_steps():
    landscape, space = ToyLandscape(12, options=LandscapeOptions(noise=0.05)), toy_problem(12).space
    rng = np.random.default_rng(0)
    drawn = [space.random(rng) for _ in range(400)]
    for steps, expected in ((900, 0.05), (100, 0.15)):
        errors = [landscape.score(c, steps) - landscape.true_score(c, steps) for c in drawn]
        assert np.std(errors) == pytest.approx(expected, rel=0.15)


def test_importance_follows_the_truth_of_the_knob():
    evaluator = ToyEvaluator(200, importance_noise=0.1)
    space = evaluator.problem().space
    landscape = evaluator.landscape
    make = REGISTRIES["estimators"].create
    for name, truth in (("fisher_residual", landscape.sensitivity), ("gradient_norm", landscape.learnable)):
        logs = np.log(evaluator.importance(make(name), space)), np.log(truth)
        assert np.corrcoef(*logs)[0, 1] > 0.9
    np.testing.assert_array_equal(evaluator.importance(make("uniform"), space), np.ones(200))


def test_an_estimators_name_does_not_tell_what_it_measures():
    class UndeclaredGradient(ImportanceEstimator):
        def estimate(self, module, batches, *, lowest_bits):
            raise AssertionError("the toy evaluator does not call estimators")

    class Learnable(UndeclaredGradient):
        measures = "learnable"

    evaluator = ToyEvaluator(5)
    space, make = evaluator.problem().space, REGISTRIES["estimators"].create
    for estimator, other in ((UndeclaredGradient(), "fisher_residual"), (Learnable(), "gradient_spectrum")):
        np.testing.assert_array_equal(evaluator.importance(estimator, space), evaluator.importance(make(other), space))


def test_share_of_failures_is_as_asked_and_fixed_for_a_configuration():
    evaluator = ToyEvaluator(8, failures=0.3)
    rng = np.random.default_rng(0)
    drawn = [evaluator.problem().space.random(rng) for _ in range(300)]
    failed = [not evaluator.measure(c, 100).ok for c in drawn]
    assert 0.2 < np.mean(failed) < 0.4
    assert failed == [not evaluator.measure(c, 900).ok for c in drawn]


def test_full_run_is_the_highest_rung_of_the_ladder(tmp_path):
    evaluator = ToyEvaluator(4)
    evaluator.open(EvaluationContext(tmp_path, FidelityLadder((10, 20)), 0))
    assert evaluator.landscape.total_steps == 20


def test_references_off_the_ladders_are_measured():
    evaluator = ToyEvaluator(4)
    assert evaluator.measure(Configuration.uniform(16, 32, 4), 900).ok


def test_fingerprint_tells_options_apart():
    assert ToyEvaluator(4).fingerprint() == ToyEvaluator(4).fingerprint()
    assert ToyEvaluator(4, seed=1).fingerprint() != ToyEvaluator(4).fingerprint()
