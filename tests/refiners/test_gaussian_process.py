"""The process and its acquisition against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate, stats

from qratk.refiners._model_guided import gaussian_process

process = gaussian_process()

import torch  # noqa: E402  (after that, which silences a warning of an import)

RNG = np.random.default_rng(3)
POINTS = RNG.choice([-1.0, 0.0, 1.0], size=(9, 6))
UTILITIES = POINTS[:, 0] - 0.5 * POINTS[:, 1] ** 2 + 0.3 * POINTS[:, 2]
POOL = RNG.choice([-1.0, 0.0, 1.0], size=(300, 6))


@pytest.fixture(scope="module")
def acquisition():
    return process.fit(POINTS, UTILITIES, best=float(UTILITIES.max()), seed=0, ard=False)


def expected_improvement(mean: float, deviation: float, best: float) -> float:
    """Eq. 16."""
    z = (mean - best) / deviation
    return (mean - best) * stats.norm.cdf(z) + deviation * stats.norm.pdf(z)


@pytest.mark.parametrize(
    ("mean", "deviation", "best", "expected"),
    [(0.0, 1.0, 0.0, 0.3989423), (1.0, 1.0, 0.0, 1.0833155), (0.0, 2.0, 1.0, 0.3955931), (3.0, 1e-9, 1.0, 2.0)],
)
def test_closed_form_gives_known_values(mean: float, deviation: float, best: float, expected: float) -> None:
    assert expected_improvement(mean, deviation, best) == pytest.approx(expected, rel=1e-6)


def test_log_ei_is_the_logarithm_of_the_closed_form(acquisition) -> None:
    mean, deviation = acquisition.posterior(POOL)
    expected = [expected_improvement(m, s, float(UTILITIES.max())) for m, s in zip(mean, deviation, strict=True)]
    found = np.exp(acquisition.log_ei(POOL))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-12)
    assert found.max() > 1e-3


def test_log_ei_equals_a_numeric_integral(acquisition) -> None:
    best = float(UTILITIES.max())
    mean, deviation = (float(v[0]) for v in acquisition.posterior(POOL[:1]))
    integral, _ = integrate.quad(
        lambda y: (y - best) * stats.norm.pdf(y, mean, deviation), best, mean + 12 * deviation, epsabs=1e-13
    )
    assert float(acquisition.log_ei(POOL[:1])[0]) == pytest.approx(math.log(integral), rel=1e-6)


def test_log_ei_stays_finite_where_the_improvement_underflows(acquisition) -> None:
    hopeless = type(acquisition)(acquisition.model, 1e3, acquisition.location, acquisition.scale)
    scores = hopeless.log_ei(POOL)
    assert np.isfinite(scores).all()
    assert scores.max() < -1000


def test_pool_is_scored_as_single_points_whatever_its_company(acquisition) -> None:
    alone = [float(acquisition.log_ei(POOL[n : n + 1])[0]) for n in range(5)]
    np.testing.assert_allclose(acquisition.log_ei(POOL)[:5], alone, rtol=1e-9)


def test_posterior_is_that_of_the_textbook(acquisition) -> None:
    """Matérn-5/2 with one length-scale (Eq. 13), noise and constant mean, solved by numpy."""
    model = acquisition.model
    length, variance = acquisition.length_scale, float(model.covar_module.outputscale.detach())
    noise, mean = float(model.likelihood.noise.detach()), float(model.mean_module.constant.detach())

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        r = np.linalg.norm(a[:, None] - b[None], axis=-1) / length
        return variance * (1 + math.sqrt(5) * r + 5 / 3 * r**2) * np.exp(-math.sqrt(5) * r)

    y = (UTILITIES - acquisition.location) / acquisition.scale
    gram = kernel(POINTS, POINTS) + noise * np.eye(len(POINTS))
    cross = kernel(POOL, POINTS)
    means = mean + cross @ np.linalg.solve(gram, y - mean)
    variances = variance - np.einsum("ij,ji->i", cross, np.linalg.solve(gram, cross.T))
    found = acquisition.posterior(POOL)
    np.testing.assert_allclose(found[0], means * acquisition.scale + acquisition.location, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[1], np.sqrt(variances) * acquisition.scale, rtol=1e-4, atol=1e-6)


def test_single_length_scale_unless_ard_is_asked_for() -> None:
    scales = [
        process.fit(POINTS, UTILITIES, best=0.0, seed=0, ard=ard).model.covar_module.base_kernel.lengthscale.numel()
        for ard in (False, True)
    ]
    assert scales == [1, 6]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_points_do_not_give_a_constant_posterior(count: int) -> None:
    fitted = process.fit(POINTS[:count], UTILITIES[:count], best=float(UTILITIES[:count].max()), seed=0, ard=False)
    scores = fitted.log_ei(POOL)
    assert np.isfinite(scores).all()
    assert np.ptp(scores) > 1e-3
    assert scores.max() > math.log(1e-4)


def test_equal_utilities_can_be_fitted() -> None:
    assert np.isfinite(process.fit(POINTS, np.full(9, 0.4), best=0.4, seed=0, ard=False).log_ei(POOL)).all()


def test_an_extra_column_gets_its_own_kernel() -> None:
    rng = np.random.default_rng(0)
    points = np.column_stack([rng.choice([-1.0, 0.0, 1.0], size=(30, 20)), rng.standard_normal(30)])
    fitted = process.fit(points, points[:, -1] * 2.0, best=1.0, seed=0, ard=False, extra=1)
    probe = np.column_stack([rng.choice([-1.0, 0.0, 1.0], size=(50, 20)), np.linspace(-1.5, 1.5, 50)])
    mean, _ = fitted.posterior(probe)
    assert np.corrcoef(mean, probe[:, -1])[0, 1] > 0.99


def test_fit_leaves_torch_as_it_was() -> None:
    torch.manual_seed(5)
    before = (torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads())
    process.fit(POINTS, UTILITIES, best=0.0, seed=11, ard=False).log_ei(POOL)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (torch.get_default_dtype(), torch.get_num_threads()) == before[1:]


def test_same_arguments_give_the_same_bits() -> None:
    scores = [process.fit(POINTS, UTILITIES, best=0.0, seed=7, ard=False).log_ei(POOL) for _ in range(2)]
    np.testing.assert_array_equal(*scores)


def test_what_cannot_be_fitted_is_one_error() -> None:
    with pytest.raises(process.FitError):
        process.fit(np.full((3, 2), np.nan), np.zeros(3), best=0.0, seed=0, ard=False)


def test_posterior_of_the_mixed_kernel_is_that_of_the_textbook() -> None:
    """(1 - w) (k_c + k_x) + w k_c k_x with k_c the share of equal bits (CoCaBO), solved by numpy."""
    mix = 0.3
    fitted = process.fit(POINTS, UTILITIES, best=0.0, seed=0, ard=False, mix=mix)
    model = fitted.model
    ordinal, categorical = model.covar_module.kernels
    length, variance = fitted.length_scale, float(ordinal.outputscale.detach())
    share, noise = float(categorical.outputscale.detach()), float(model.likelihood.noise.detach())
    mean = float(model.mean_module.constant.detach())

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        r = np.linalg.norm(a[:, None, 3:] - b[None, :, 3:], axis=-1) / length
        ranks = variance * (1 + math.sqrt(5) * r + 5 / 3 * r**2) * np.exp(-math.sqrt(5) * r)
        bits = share * (a[:, None, :3] == b[None, :, :3]).mean(axis=-1)
        return (1 - mix) * (bits + ranks) + mix * bits * ranks

    y = (UTILITIES - fitted.location) / fitted.scale
    gram = kernel(POINTS, POINTS) + noise * np.eye(len(POINTS))
    cross = kernel(POOL, POINTS)
    means = mean + cross @ np.linalg.solve(gram, y - mean)
    variances = np.diag(kernel(POOL, POOL)) - np.einsum("ij,ji->i", cross, np.linalg.solve(gram, cross.T))
    found = fitted.posterior(POOL)
    np.testing.assert_allclose(found[0], means * fitted.scale + fitted.location, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[1], np.sqrt(variances) * fitted.scale, rtol=1e-4, atol=1e-6)


def test_bits_have_no_order_under_the_mixed_kernel() -> None:
    fitted = process.fit(POINTS, UTILITIES, best=0.0, seed=0, ard=False, mix=0.5)
    renamed = POINTS.copy()
    renamed[:, :3] = np.select([renamed[:, :3] == v for v in (-1.0, 0.0, 1.0)], [5.0, -3.0, 0.0])
    other = process.fit(renamed, UTILITIES, best=0.0, seed=0, ard=False, mix=0.5)
    pool = POOL.copy()
    pool[:, :3] = np.select([pool[:, :3] == v for v in (-1.0, 0.0, 1.0)], [5.0, -3.0, 0.0])
    np.testing.assert_allclose(other.log_ei(pool), fitted.log_ei(POOL), rtol=1e-6)
