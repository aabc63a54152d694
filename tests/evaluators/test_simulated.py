"""The simulated evaluator: every parameter counts, the best known configuration is the best, YAML reaches all of it."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from qratk.components import REGISTRIES
from qratk.core import ConfigurationError, FidelityLadder
from qratk.core.problem import Importance, Problem
from qratk.evaluators.base import EvaluationContext
from qratk.evaluators.landscape import Landscape, LandscapeOptions, best_known
from qratk.evaluators.simulated import SimulatedEvaluator
from qratk.reporters.multi import Reporters
from qratk.settings.recipe import autoqra
from qratk.testing import ToyEvaluator, toy_problem

RICH = {"neighbours": 0.5, "crossing": 0.05, "slowness_spread": 0.5, "interaction": 0.3, "error_per_bit": (1.5, 4.0)}


@pytest.mark.parametrize("seed", range(6))
def test_best_known_configuration_is_that_of_brute_force(seed):
    evaluator = ToyEvaluator(num_layers=4, seed=seed, landscape=RICH)
    problem = evaluator.problem(like=(4, 8))
    _, truth = evaluator.optimum(problem.space, problem.budget)
    found, score = best_known(evaluator.landscape, problem, start=problem.space.smallest)
    assert problem.feasible(found)
    assert score == pytest.approx(truth, abs=1e-12)


@pytest.mark.parametrize("name", [field.name for field in fields(LandscapeOptions)])
def test_every_parameter_changes_the_scores(name):
    problem = toy_problem(6, shared={"learning_rate": (1e-3, 1e-1), "rslora": (False, True)})
    rng = np.random.default_rng(0)
    configurations = [problem.space.random(rng) for _ in range(5)]
    values = {"neighbours": 0.5, "crossing": 0.1, "slowness_spread": 0.5, "compensation": (0.7, 0.9)}
    changed = values.get(name, getattr(LandscapeOptions(), name))
    changed = changed if name in values else (13.0 if name == "half_rank" else 1.5 * changed)
    before = [Landscape(6).score(c, 300) for c in configurations]
    after = [Landscape(6, options=LandscapeOptions.of({name: changed})).score(c, 300) for c in configurations]
    assert not np.allclose(before, after)


def test_crossing_misleads_short_runs_and_leaves_full_runs_alone():
    options = LandscapeOptions.of({"crossing": 0.5})
    space = toy_problem(8).space
    rng = np.random.default_rng(1)
    for configuration in (space.random(rng) for _ in range(5)):
        plain, crossed = Landscape(8), Landscape(8, options=options)
        assert crossed.true_score(configuration, 900) == plain.true_score(configuration, 900)
        assert crossed.true_score(configuration, 100) != plain.true_score(configuration, 100)


def test_ranges_are_drawn_by_seed_and_stay_within():
    options = LandscapeOptions.of({"interaction": [0.1, 0.4]})
    drawn = {Landscape(4, seed, options=options).parameters["interaction"] for seed in range(20)}
    assert len(drawn) == 20
    assert all(0.1 <= value <= 0.4 for value in drawn)


def test_seed_of_the_search_chooses_the_landscape_unless_one_is_given(tmp_path: Path):
    def sensitivity(seed):
        evaluator = SimulatedEvaluator(num_layers=5, seed=seed)
        evaluator.open(EvaluationContext(tmp_path, FidelityLadder((10, 20)), 7))
        return evaluator.landscape.sensitivity

    np.testing.assert_array_equal(sensitivity(None), sensitivity(7))
    assert not np.array_equal(sensitivity(None), sensitivity(3))


def test_one_estimator_may_be_noisier_than_the_others():
    problem, estimator = toy_problem(300), REGISTRIES["estimators"].create("quantization_error")
    plain = SimulatedEvaluator(300, 0, importance_noise=0.1)
    noisy = SimulatedEvaluator(300, 0, importance_noise=0.1, estimator_noise={"quantization_error": 2.0})
    truth = np.log(plain.landscape.sensitivity)

    def correlation(evaluator):
        return np.corrcoef(np.log(evaluator.importance(estimator, problem.space)), truth)[0, 1]

    assert correlation(noisy) < 0.8 < correlation(plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"landscape": {"sensitivity": 1.0}}, "unknown parameters"),
        ({"landscape": {"noise": -1.0}}, "noise must be at least 0"),
        ({"landscape": {"noise": [0.2, 0.1]}}, "ascending pair"),
        ({"landscape": {"noise": "loud"}}, "a number or a pair"),
        ({"num_layers": 0}, "num_layers must be between 1 and"),
        ({"num_layers": 2147483648}, "num_layers must be between 1 and"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ConfigurationError, match=message):
        SimulatedEvaluator(**options)


@pytest.mark.parametrize("layers", [8, 126])
def test_whole_search_runs_at_any_depth(tmp_path: Path, layers: int):
    loop = autoqra(evaluator={"simulated": {"num_layers": layers}}, like=(4, 16), generations=2, refiner="none", seed=2)
    result = loop.run(run_dir=tmp_path, reporter=Reporters([]), config={})
    assert len(result.best.configuration) == layers
    assert result.test_scores[str(result.best.configuration)]["score"] == pytest.approx(result.best.score, abs=0.1)


def test_problem_needs_no_importance_to_find_the_best_known():
    evaluator = ToyEvaluator(num_layers=12, seed=1)
    problem = evaluator.problem()
    blind = Problem(problem.shapes, problem.memory, problem.budget, Importance.uniform(12))
    found = [best_known(evaluator.landscape, p, start=p.space.smallest) for p in (problem, blind)]
    assert found[0] == found[1]


def test_a_learning_rate_costs_the_square_of_the_decades_to_the_best_one():
    landscape = Landscape(6, options=LandscapeOptions.of({"best_rate": 1e-2, "rate_curvature": 0.2}))
    bare = toy_problem(6).space.smallest
    worth = [landscape.true_score(bare.with_shared({"learning_rate": rate}), 300) for rate in (1e-4, 1e-3, 1e-2, 1e-1)]
    np.testing.assert_allclose(np.array(worth) - landscape.true_score(bare, 300), [-0.8, -0.2, 0.0, -0.2], atol=1e-12)


def test_best_known_configuration_has_the_best_settings():
    shared = {"learning_rate": (1e-3, 1e-2, 1e-1), "schedule": ("constant", "linear", "cosine")}
    evaluator = ToyEvaluator(num_layers=3, seed=1, landscape={"best_rate": 0.02})
    problem = evaluator.problem(like=(4, 8), shared=shared)
    winner, truth = evaluator.optimum(problem.space, problem.budget)
    found, score = best_known(evaluator.landscape, problem, start=problem.space.smallest)
    assert score == pytest.approx(truth, abs=1e-12)
    assert found.settings["learning_rate"] == winner.settings["learning_rate"] == 1e-2
    every = [winner.with_shared(other) for other in problem.space.all_shared]
    assert max(every, key=lambda c: evaluator.landscape.true_score(c, 900)) == winner


def test_defaults_of_what_settings_are_worth_leave_the_fingerprint_as_it_was():
    plain, other = ToyEvaluator(num_layers=3), ToyEvaluator(num_layers=3, landscape={"best_rate": 0.02})
    assert "best_rate" not in repr(plain.options)
    assert plain.fingerprint() != other.fingerprint()
