"""The additive model: exact regression, better importances from short runs, and what it makes of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qratk.core import History
from qratk.core.problem import Importance
from qratk.evaluators.landscape import best_known
from qratk.programs.integer import best_choice
from qratk.searchers._additive import AdditiveModel
from qratk.searchers.sampling import sample_feasible
from qratk.testing import ToyEvaluator

STEPS = (100, 300, 900)


def posed(layers: int, seed: int, *, importance_noise: float = 1.0):
    evaluator = ToyEvaluator(layers, seed, noise=0.002, importance_noise=importance_noise)
    return evaluator, evaluator.problem(like=(4, 8))


def measured(evaluator, problem, *, short: int, full: int = 3, seed: int = 0) -> History:
    rng = np.random.default_rng(seed)
    drawn = [*problem.space.uniforms(), *(sample_feasible(problem, rng) for _ in range(short))]
    runs = [(c, 100) for c in drawn] + [(c, 900) for c in drawn[-full:]]
    return History(evaluator.measure(c, steps) for c, steps in dict.fromkeys(runs))


def test_posterior_mean_is_the_ridge_solution():
    evaluator, problem = posed(4, 0)
    model = AdditiveModel(problem, measured(evaluator, problem, short=20), STEPS)
    for posterior in model.posteriors:
        scaled = posterior.design / posterior.noise[:, None]
        ridge = np.linalg.solve(
            scaled.T @ scaled + np.eye(scaled.shape[1]), scaled.T @ (posterior.target / posterior.noise)
        )
        np.testing.assert_allclose(posterior.draw(None), posterior.select @ ridge, rtol=1e-6, atol=1e-9)


def test_draws_have_the_posterior_mean_and_covariance():
    evaluator, problem = posed(3, 1)
    posterior = AdditiveModel(problem, measured(evaluator, problem, short=12), STEPS).posteriors[5]
    rng = np.random.default_rng(0)
    draws = np.array([posterior.draw(rng) for _ in range(4000)])
    scaled = posterior.design / posterior.noise[:, None]
    covariance = posterior.select @ np.linalg.inv(scaled.T @ scaled + np.eye(scaled.shape[1])) @ posterior.select.T
    deviation = np.sqrt(np.diag(covariance))
    np.testing.assert_allclose(draws.mean(axis=0), posterior.draw(None), atol=5 * deviation.max() / 4000**0.5)
    np.testing.assert_allclose(draws.std(axis=0), deviation, rtol=0.1)


def test_short_runs_correct_wrong_importances():
    """Spearman of the values' spread over bits with the true sensitivities rises over that of the importances."""
    from scipy.stats import spearmanr

    before, after = [], []
    for seed in range(6):
        evaluator, problem = posed(12, seed, importance_noise=1.5)
        model = AdditiveModel(problem, measured(evaluator, problem, short=80), STEPS)
        values = model.values()
        learnt = values[:, -1, 0] - values[:, 0, 0]
        before.append(spearmanr(problem.importance.bits, evaluator.landscape.sensitivity).statistic)
        after.append(spearmanr(learnt, evaluator.landscape.sensitivity).statistic)
    assert np.mean(after) > np.mean(before) + 0.1


def test_best_configuration_of_the_model_is_near_the_best_known_one():
    regrets, starts = [], []
    for seed in range(6):
        evaluator, problem = posed(12, seed)
        history = measured(evaluator, problem, short=60)
        found = best_choice(problem, AdditiveModel(problem, history, STEPS).values())
        start = max(
            (e.configuration for e in history.at(900) if problem.feasible(e.configuration)), key=truth(evaluator)
        )
        _, best = best_known(evaluator.landscape, problem, start=start)
        regrets.append(best - truth(evaluator)(found))
        starts.append(best - truth(evaluator)(start))
    assert np.mean(regrets) < 0.5 * np.mean(starts)


def truth(evaluator):
    return lambda configuration: evaluator.landscape.true_score(configuration, 900)


def test_little_data_are_not_fitted():
    evaluator, problem = posed(4, 0)
    history = History(evaluator.measure(c, 100) for c in problem.space.uniforms()[:5])
    assert not AdditiveModel(problem, history, STEPS).ready


def test_values_rise_with_bits_and_ranks_whatever_is_drawn():
    evaluator, problem = posed(6, 2)
    model = AdditiveModel(problem, measured(evaluator, problem, short=10), STEPS)
    rng = np.random.default_rng(0)
    for _ in range(20):
        values = model.values(rng)
        assert (np.diff(values, axis=1) > 0).all()
        assert (np.diff(values, axis=2) > 0).all()


@pytest.mark.parametrize("case", ["equal scores", "one rung", "no importance"])
def test_degenerate_data_are_survived(case):
    evaluator, problem = posed(4, 0)
    history = measured(evaluator, problem, short=12)
    if case == "equal scores":
        history = History(replace(e, score=0.5) for e in history)
    if case == "no importance":
        problem = replace(problem, importance=Importance((0.0,) * 4, (0.0,) * 4))
    model = AdditiveModel(problem, history, STEPS[-1:] if case == "one rung" else STEPS)
    if model.ready:
        assert np.isfinite(model.values(np.random.default_rng(0))).all()
        assert problem.feasible(best_choice(problem, model.values()))
