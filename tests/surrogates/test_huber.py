from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from qratk.core import Evaluation, History, Problem
from qratk.core.correlation import spearman
from qratk.core.errors import ConfigurationError
from qratk.surrogates._regression import rows
from qratk.surrogates.huber import HuberRegression, fit_huber
from qratk.testing import toy_problem


def data(n: int, d: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) * rng.uniform(0.1, 10, size=d) + rng.normal(size=d)
    y = 3.0 + x @ rng.normal(size=d) + rng.standard_t(2, size=n)
    return x, y


def torch_objective(x, y, theta, intercept, delta, l2):
    """Eq. 10 by torch's own Huber loss, on standardised features and target."""
    z = torch.tensor((x - x.mean(0)) / x.std(0))
    t = torch.tensor((y - y.mean()) / y.std())
    loss = torch.nn.HuberLoss(reduction="sum", delta=delta)(z @ theta + intercept, t)
    return loss + l2 * (theta**2).sum()


@pytest.mark.parametrize(("n", "d"), [(30, 4), (8, 20), (12, 12)])
@pytest.mark.parametrize(("delta", "l2"), [(1.0, 1.0), (0.2, 0.01), (50.0, 3.0)])
def test_fit_is_where_torchs_gradient_of_eq_10_vanishes(n, d, delta, l2):
    """The objective is strictly convex in theta, so that a vanishing gradient means the minimum."""
    x, y = data(n, d)
    model = fit_huber(x, y, delta=delta, l2=l2)
    theta = torch.tensor(model.coefficients, requires_grad=True)
    intercept = torch.tensor(model.intercept, dtype=torch.float64, requires_grad=True)
    torch_objective(x, y, theta, intercept, delta, l2).backward()
    assert theta.grad.abs().max() < 1e-5
    assert abs(intercept.grad) < 1e-5


def test_large_delta_gives_ridge_regression():
    x, y = data(25, 5)
    model = fit_huber(x, y, delta=1e6, l2=0.7)
    z, t = (x - x.mean(0)) / x.std(0), y - y.mean()
    ridge = np.linalg.solve(z.T @ z / 2 + 0.7 * np.eye(5), z.T @ t / 2)
    np.testing.assert_allclose(model.predict(x), y.mean() + z @ ridge, rtol=1e-6)


def test_one_wild_outlier_hardly_moves_the_prediction():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 2))
    y = x[:, 0]
    spoilt = y.copy()
    spoilt[0] += 5.0
    robust = fit_huber(x, spoilt, delta=0.1, l2=0.01).predict(x)[1:]
    squares = fit_huber(x, spoilt, delta=1e6, l2=0.01).predict(x)[1:]
    assert np.abs(robust - y[1:]).mean() < 0.3 * np.abs(squares - y[1:]).mean()


def test_features_are_score_log_bytes_and_embedding():
    problem = toy_problem(3)
    configuration = problem.space.uniform(4, 8)
    row = rows(problem, [Evaluation(configuration, 100, 0.25, problem.footprint(configuration))])[0]
    assert row.shape == (2 + 2 * 3,)
    assert row[0] == 0.25
    assert row[1] == math.log(problem.bytes(configuration))
    np.testing.assert_array_equal(row[2:], problem.space.embed(configuration))


def history(problem: Problem, pairs: int, low_score) -> History:
    """Pairs whose final score is the number of bits, and whose short-run score is `low_score(final, rng)`."""
    rng = np.random.default_rng(1)
    found = History()
    while len(found) < 2 * pairs:
        configuration = problem.space.random(rng)
        if found.get(configuration, 100) is None:
            final, footprint = float(sum(configuration.bits)), problem.footprint(configuration)
            found.append(Evaluation(configuration, 100, float(low_score(final, rng)), footprint))
            found.append(Evaluation(configuration, 900, final, footprint))
    return found


def test_surrogate_is_trusted_when_short_runs_mislead_but_bytes_tell():
    problem, surrogate = toy_problem(6), HuberRegression()
    surrogate.fit(problem, history(problem, 30, lambda final, rng: rng.normal()), low=100, high=900)
    assert surrogate.trusted
    assert surrogate.quality.spearman > surrogate.quality.low_fidelity_spearman + 0.3


def test_surrogate_is_not_trusted_when_short_runs_rank_perfectly():
    problem, surrogate = toy_problem(6), HuberRegression()
    surrogate.fit(problem, history(problem, 30, lambda final, rng: final**3), low=100, high=900)
    assert surrogate.quality.low_fidelity_spearman == pytest.approx(1.0)
    assert not surrogate.trusted


def test_number_of_pairs_must_reach_min_pairs():
    problem = toy_problem(6)
    pairs = history(problem, 10, lambda final, rng: rng.normal())
    for min_pairs, fitted in ((10, True), (11, False)):
        surrogate = HuberRegression(min_pairs=min_pairs)
        surrogate.fit(problem, pairs, low=100, high=900)
        assert math.isnan(surrogate.quality.spearman) is not fitted


def test_unfitted_surrogate_predicts_the_short_run_itself():
    problem, surrogate = toy_problem(6), HuberRegression()
    pairs = history(problem, 3, lambda final, rng: rng.normal())
    surrogate.fit(problem, pairs, low=100, high=900)
    asked = pairs.at(100)
    assert [p.mean for p in surrogate.predict(problem, asked)] == [e.score for e in asked]


def test_held_out_pairs_do_not_reach_their_own_prediction():
    """With pure noise to learn, honest cross-validation shows no correlation; fitting would show a strong one."""
    problem, rng = toy_problem(20), np.random.default_rng(5)
    found = History()
    for _ in range(40):
        configuration = problem.space.random(rng)
        for steps in (100, 900):
            found.append(Evaluation(configuration, steps, float(rng.normal()), problem.footprint(configuration)))
    surrogate = HuberRegression(l2=0.01)
    surrogate.fit(problem, found, low=100, high=900)
    predicted = [p.mean for p in surrogate.predict(problem, found.at(100))]
    assert spearman(predicted, [e.score for e in found.at(900)]) > 0.9
    assert abs(surrogate.quality.spearman) < 0.5


@pytest.mark.parametrize("options", [{"delta": 0.0}, {"l2": -1.0}, {"folds": 1}, {"min_pairs": 3}])
def test_senseless_options_are_refused(options):
    with pytest.raises(ConfigurationError):
        HuberRegression(**options)
