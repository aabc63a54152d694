"""Gaussian process on utilities and its expected improvement, by BoTorch (Eq. 12, 13, 16)."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from botorch import settings
from botorch.acquisition.analytic import LogExpectedImprovement
from botorch.exceptions.errors import BotorchError, ModelFittingError
from botorch.exceptions.warnings import BotorchWarning
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.utils.gpytorch_modules import get_gaussian_likelihood_with_lognormal_prior
from gpytorch.constraints import GreaterThan
from gpytorch.kernels import Kernel, MaternKernel, ScaleKernel
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.priors import LogNormalPrior
from linear_operator import to_dense
from linear_operator.utils.errors import NanError, NotPSDError
from linear_operator.utils.warnings import NumericalWarning
from numpy.typing import NDArray

CHUNK = 128
"""Pool members scored at once. The batched posterior takes (chunk, n + 1, dimensions): 128 was twice as fast as 512."""


class FitError(RuntimeError):
    """The process could not be fitted or gave no finite expected improvement; the message says why."""


@dataclass(frozen=True)
class Acquisition:
    """Fitted process with the best utility so far: scores points by expected improvement.

    Utilities are standardised for the fit; `log_ei` is in the utility's own units again.
    """

    model: SingleTaskGP
    best: float
    location: float
    scale: float

    def log_ei(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Logarithm of the expected improvement (Eq. 16) of each point (N, d), (N,); raises `FitError`."""
        acquisition = LogExpectedImprovement(self.model, best_f=(self.best - self.location) / self.scale)
        with _isolated(0), torch.no_grad(), _fit_errors():
            batch = torch.as_tensor(points, dtype=torch.float64).unsqueeze(-2)  # (N, 1, d): single points
            scores = torch.cat([acquisition(chunk) for chunk in torch.split(batch, CHUNK)]).numpy() + math.log(
                self.scale
            )
        if np.isnan(scores).any():
            raise FitError("the expected improvement is not a number")
        return scores

    def posterior(self, points: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and standard deviation of the latent utility at points (N, d), each (N,)."""
        with _isolated(0), torch.no_grad(), _fit_errors():
            found = self.model.posterior(torch.as_tensor(points, dtype=torch.float64).unsqueeze(-2))
            mean, variance = found.mean.reshape(-1).numpy(), found.variance.reshape(-1).numpy()
        return mean * self.scale + self.location, np.sqrt(variance) * self.scale

    @property
    def length_scale(self) -> float:
        """Length-scale of the embedding; the mean of them under ARD."""
        kernel = self.model.covar_module
        while not isinstance(kernel, MaternKernel):
            kernel = kernel.kernels[0] if hasattr(kernel, "kernels") else kernel.base_kernel
        return float(kernel.lengthscale.detach().mean())


def fit(
    points: NDArray[np.float64],
    utilities: NDArray[np.float64],
    *,
    best: float,
    seed: int,
    ard: bool,
    extra: int = 0,
    mix: float | None = None,
    layers: int | None = None,
) -> Acquisition:
    """Acquisition fitted to points (n, d) and utilities (n,) by maximum marginal likelihood; raises `FitError`.

    The kernel is Eq. 13, Matérn-5/2 with one length-scale (one a dimension with `ard`). Its prior is LogNormal(sqrt 2
    + ln(d)/2, sqrt 3): without one, two or three points give a constant posterior and the search stops at once. The
    last `extra` columns are other observations of the same points; they get a kernel of their own, added, since one
    coordinate would hardly count in a distance over 2 L of them. With `mix`, the kernel is that of `MixedKernel`
    instead: the first `layers` columns, the bits, are then categorical (half of the embedding by default).

    Neither torch's random state nor its default type or thread count are changed for others; the same arguments give
    the same bits.
    """
    location = float(utilities.mean())
    scale = float(utilities.std(ddof=1)) if len(utilities) > 1 else 0.0
    scale = scale if scale > 1e-12 else 1.0
    with _isolated(seed), _fit_errors():
        train_x = torch.as_tensor(points, dtype=torch.float64)
        train_y = torch.as_tensor((utilities - location) / scale, dtype=torch.float64).unsqueeze(-1)
        model = SingleTaskGP(
            train_x,
            train_y,
            likelihood=get_gaussian_likelihood_with_lognormal_prior(),
            covar_module=_kernel(points.shape[1], extra, ard, mix, layers),
            outcome_transform=None,
        )
        fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    return Acquisition(model.eval(), best, location, scale)


class OverlapKernel(Kernel):  # type: ignore[misc]
    """Share of the coordinates in which two points agree (Ru et al. 2020, Eq. 2); no rung is nearer than another."""

    def forward(self, x1: torch.Tensor, x2: torch.Tensor, diag: bool = False, **params: object) -> torch.Tensor:
        if diag:
            return torch.ones(x1.shape[:-1], dtype=x1.dtype)
        return 1.0 - torch.cdist(x1, x2, p=0.0) / x1.shape[-1]  # the "distance" of p = 0 counts what differs


class MixedKernel(Kernel):  # type: ignore[misc]
    """(1 - w) (k_c + k_x) + w k_c k_x of a categorical and an ordinal kernel (CoCaBO, Ru et al. 2020, Eq. 3)."""

    def __init__(self, ordinal: Kernel, categorical: Kernel, mix: float) -> None:
        super().__init__()
        self.kernels = torch.nn.ModuleList([ordinal, categorical])
        self.mix = mix

    def forward(self, x1: torch.Tensor, x2: torch.Tensor, diag: bool = False, **params: object) -> torch.Tensor:
        ordinal, categorical = (to_dense(kernel(x1, x2, diag=diag, **params)) for kernel in self.kernels)
        mixed: torch.Tensor = (1 - self.mix) * (ordinal + categorical) + self.mix * ordinal * categorical
        return mixed


def _mixed(layers: int, size: int, ard: bool, mix: float) -> MixedKernel:
    overlap = ScaleKernel(OverlapKernel(active_dims=tuple(range(layers))), outputscale_prior=LogNormalPrior(0.0, 1.0))
    return MixedKernel(_matern(range(layers, size), ard), overlap, mix)


def _kernel(dimensions: int, extra: int, ard: bool, mix: float | None, layers: int | None) -> Kernel:
    size = dimensions - extra
    embedding = _matern(range(size), ard) if mix is None else _mixed(layers or size // 2, size, ard, mix)
    if extra == 0:
        return embedding
    return embedding + _matern(range(dimensions - extra, dimensions), ard)


def _matern(columns: range, ard: bool) -> ScaleKernel:
    size = len(columns)
    prior = LogNormalPrior(math.sqrt(2) + math.log(size) / 2, math.sqrt(3))
    base = MaternKernel(
        nu=2.5,
        ard_num_dims=size if ard else None,
        active_dims=tuple(columns),
        lengthscale_prior=prior,
        lengthscale_constraint=GreaterThan(2.5e-2, transform=None, initial_value=prior.mode),
    )
    # Utilities are standardised: a variance near 1 is expected, and few points cannot tell otherwise.
    return ScaleKernel(base, outputscale_prior=LogNormalPrior(0.0, 1.0))


@contextlib.contextmanager
def _isolated(seed: int) -> Iterator[None]:
    """One thread (faster on small fits, and reproducible), own random state, the libraries' remarks silenced."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]), settings.validate_input_scaling(False), warnings.catch_warnings():
            for category in (BotorchWarning, NumericalWarning):
                warnings.simplefilter("ignore", category)
            torch.default_generator.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _fit_errors() -> Iterator[None]:
    try:
        yield
    except (ModelFittingError, BotorchError, NanError, NotPSDError, ArithmeticError, ValueError, RuntimeError) as error:
        if isinstance(error, FitError):
            raise
        raise FitError(f"{type(error).__name__}: {error}") from error
