from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import check_grad
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, DotProduct, Matern, WhiteKernel

from qratk.surrogates._process import fit_process, log_marginal_likelihood


def data(n: int, d: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    y = 0.8 * x[:, 0] + np.sin(2 * x[:, 1]) + 0.1 * rng.normal(size=n)
    return (x - x.mean(axis=0)) / x.std(axis=0), (y - y.mean()) / y.std()


def test_marginal_likelihood_and_mean_agree_with_scikit_learns():
    """Its kernels take all columns: with one column beside the score set to 0, the linear part sees the score alone."""
    x, y = data(20, 2)
    logs = np.log([0.7, 0.4, 1.3, 0.05])
    x[:, 1] = 0.0
    matern_of_nothing = 0.4  # Matern-5/2 of equal points is its scale
    kernel = ConstantKernel(0.7) * DotProduct(0.0, "fixed") + ConstantKernel(matern_of_nothing) + WhiteKernel(0.05)
    theirs = GaussianProcessRegressor(kernel, alpha=1e-8, optimizer=None).fit(x, y)
    assert log_marginal_likelihood(x, y, logs)[0] == pytest.approx(theirs.log_marginal_likelihood_value_)


def test_matern_part_agrees_with_scikit_learns():
    x, y = data(20, 4)
    x[:, 0] = 0.0
    logs = np.log([0.7, 0.4, 1.3, 0.05])
    kernel = ConstantKernel(0.4) * Matern(1.3, nu=2.5) + WhiteKernel(0.05)
    theirs = GaussianProcessRegressor(kernel, alpha=1e-8, optimizer=None).fit(x, y)
    assert log_marginal_likelihood(x, y, logs)[0] == pytest.approx(theirs.log_marginal_likelihood_value_)


def test_prediction_is_scikit_learns_at_the_same_parameters():
    x, y = data(30, 4)
    x[:, 0] = 0.0
    process = fit_process(x, y)
    _, scale, length, noise = np.exp(process.logs)
    kernel = ConstantKernel(scale) * Matern(length, nu=2.5) + WhiteKernel(noise)
    theirs = GaussianProcessRegressor(kernel, alpha=1e-8, optimizer=None).fit(x, y)
    new = np.column_stack([np.zeros(9), np.random.default_rng(3).normal(size=(9, 3))])
    np.testing.assert_allclose(process.predict(new), theirs.predict(new), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_gradient_is_that_of_finite_differences(seed):
    x, y = data(15, 5, seed)
    logs = np.random.default_rng(seed).normal(size=4)
    error = check_grad(
        lambda p: log_marginal_likelihood(x, y, p)[0], lambda p: log_marginal_likelihood(x, y, p)[1], logs
    )
    assert error < 1e-4


def test_process_learns_what_a_line_cannot():
    x, y = data(80, 3)
    process = fit_process(x[:50], y[:50])
    line = np.linalg.lstsq(x[:50], y[:50], rcond=None)[0]
    errors = [np.mean((guess - y[50:]) ** 2) for guess in (process.predict(x[50:]), x[50:] @ line)]
    assert errors[0] < 0.3 * errors[1]


def test_score_alone_is_followed_beyond_the_pairs():
    """The linear part extrapolates, where a stationary kernel alone would fall back to the mean."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 4))
    process = fit_process(x, x[:, 0])
    far = np.array([[6.0, 0.0, 0.0, 0.0]])
    assert process.predict(far)[0] == pytest.approx(6.0, abs=0.5)
