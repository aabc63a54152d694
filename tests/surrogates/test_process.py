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


def sklearns(scales) -> GaussianProcessRegressor:
    line, matern, length, noise = scales
    kernel = (
        ConstantKernel(line) * DotProduct(0.0, "fixed")
        + ConstantKernel(matern) * Matern(length, nu=2.5)
        + WhiteKernel(noise)
    )
    return GaussianProcessRegressor(kernel, alpha=1e-8, optimizer=None)


@pytest.mark.parametrize("scales", [(0.7, 0.4, 1.3, 0.05), (0.01, 2.0, 0.2, 1.0)])
def test_marginal_likelihood_is_scikit_learns(scales):
    x, y = data(20, 4)
    theirs = sklearns(scales).fit(x, y).log_marginal_likelihood_value_
    assert log_marginal_likelihood(x, y, np.log(scales))[0] == pytest.approx(theirs)


def test_prediction_is_scikit_learns_at_the_same_parameters():
    x, y = data(30, 4)
    process = fit_process(x, y)
    new = np.random.default_rng(3).normal(size=(9, 4))
    theirs = sklearns(np.exp(process.logs)).fit(x, y).predict(new)
    np.testing.assert_allclose(process.predict(new), theirs, rtol=1e-6, atol=1e-8)


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


def test_line_is_followed_beyond_the_pairs():
    """The linear part extrapolates, where a stationary kernel alone would fall back to the mean."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 4))
    process = fit_process(x, x[:, 0])
    far = np.array([[6.0, 0.0, 0.0, 0.0]])
    assert process.predict(far)[0] == pytest.approx(6.0, abs=0.5)
