"""What an adapter could learn: the leading spectral energy of the mean gradient (Eq. 25, 26)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from qratk.core.errors import ConfigurationError
from qratk.core.memory import parse_bytes
from qratk.estimators.base import Gathering, ImportanceEstimator, Measured, estimators

if TYPE_CHECKING:
    from torch import Tensor

    from qratk.bank.gradients import BatchSize
    from qratk.training.module import FineTuneModule


_SMALL: Final = 256  # rows or columns up to which all eigenvalues take no longer
_TOLERANCE: Final = 3e-4
_RANK: Final = 1e-6  # of the energy: what is shorter is rounding


@estimators.register("gradient_spectrum")
class GradientSpectrum(ImportanceEstimator):
    """I_r(l) = sum over projections of the largest `components` squared singular values of the mean gradient.

    The gradient is that of the projection's own weight, averaged over the batches (Eq. 25: the K steps of a probe;
    the weights stay as they are, so that the result does not depend on a learning rate). Dense mean gradients are
    held for as many projections at a time as `gradient_memory` allows; the batches are gone through once for each
    such chunk.

    Values are exact for projections with at most 256 inputs or outputs, and right to 1e-3 for larger ones.

    Args:
        components: number of singular values, J_0.
        max_batches: use at most so many of the batches, K.
        gradient_memory: bytes of float32 gradients held at a time, e.g. "1GiB"; one projection always fits.
    """

    measures: ClassVar[Measured] = "learnable"

    def __init__(
        self, components: int = 8, max_batches: int | None = None, gradient_memory: str | int = "1GiB"
    ) -> None:
        if components < 1 or (max_batches is not None and max_batches < 1):
            raise ConfigurationError("gradient_spectrum: components and max_batches must be at least 1")
        self.components = components
        self.max_batches = max_batches
        self.gradient_bytes = parse_bytes(gradient_memory)

    def estimate(
        self, module: FineTuneModule, batches: Sequence[dict[str, Any]], *, lowest_bits: int
    ) -> NDArray[np.float64]:
        """Scores (L,). Raises `DataError` when nothing is labelled."""
        from qratk.bank.gradients import mean_gradients

        scores = np.zeros(len(module.backbone.layers))
        layer_of = _layer_of(module)
        projections = [projection for layer in module.backbone.layers for projection in layer.modules]
        chosen = batches[: self.max_batches]
        for name, gradient in mean_gradients(module.backbone.model, projections, chosen, self.gradient_bytes):
            scores[layer_of[name]] += spectral_energy(gradient, self.components)
        return scores

    def gathering(
        self, module: FineTuneModule, batches: Sequence[dict[str, Any]], *, lowest_bits: int
    ) -> Gathering | None:
        """Mean gradients, if all may be held at a time and none of the batches is left out."""
        from qratk.bank.gradients import gradient_chunks

        projections = [projection for layer in module.backbone.layers for projection in layer.modules]
        whole = len(list(gradient_chunks(projections, self.gradient_bytes))) == 1
        if not whole or len(batches) != len(batches[: self.max_batches]):
            return None
        return _Spectra(module, self.components)


class _Spectra(Gathering):
    """Mean gradients of all projections, and the leading spectral energy of each, added up by layer."""

    def __init__(self, module: FineTuneModule, components: int) -> None:
        from qratk.bank.gradients import GradientSums

        self._gradients, self._layer_of, self._components = GradientSums(), _layer_of(module), components
        self._layers = len(module.backbone.layers)

    def visit(self, name: str, x: Tensor, grad: Tensor, size: BatchSize) -> None:
        """Add a batch's gradient."""
        self._gradients.visit(name, x, grad, size)

    def scores(self, sizes: Sequence[BatchSize]) -> NDArray[np.float64]:
        """Energies."""
        scores = np.zeros(self._layers)
        gradients = self._gradients.means(sizes)
        for name, layer in self._layer_of.items():
            if name in gradients:
                scores[layer] += spectral_energy(gradients.pop(name), self._components)
        return scores


def _layer_of(module: FineTuneModule) -> dict[str, int]:
    return {name: number for number, layer in enumerate(module.backbone.layers) for name, _ in layer.modules}


def spectral_energy(matrix: Tensor, components: int, *, tolerance: float = _TOLERANCE) -> float:
    """Sum of the largest squared singular values of a matrix.

    Of a small one by the eigenvalues of the smaller Gram matrix, in float64. Of a large one by block Krylov subspaces
    from a fixed random start (Musco and Musco 2015, arXiv:1504.05477), which grow until the sum does by less than the
    tolerance, relatively: a lower bound, and short of the exact sum by less than 1e-3 whatever the spectrum.
    """
    import torch

    if min(matrix.shape) > max(_SMALL, 4 * components):
        return _krylov_energy(matrix, components, tolerance)
    matrix = matrix.double()
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    # Rounding may turn a zero eigenvalue negative.
    return float(torch.linalg.eigvalsh(gram)[-components:].clamp(min=0).sum())


def _krylov_energy(matrix: Tensor, components: int, tolerance: float) -> float:
    import torch

    wide = matrix.float() if matrix.shape[0] <= matrix.shape[1] else matrix.float().T
    scale = float(wide.abs().max())
    if scale == 0.0:
        return 0.0
    wide = wide / scale  # squares of gradients may leave the range of float32
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(wide.shape[1], 2 * components, generator=generator).to(wide.device)
    block = _orthonormal(wide @ start)
    basis, rows, energy = block, block.T @ wide, 0.0
    products = rows
    while True:
        values = torch.linalg.eigvalsh((rows @ rows.T).double())
        previous, energy = energy, float(values[-components:].clamp(min=0).sum())
        new = wide @ products.T
        for _ in range(2):  # once loses orthogonality to rounding
            new = new - basis @ (basis.T @ new)
        block = _orthonormal(new, least=_RANK * energy)
        if energy - previous <= tolerance * energy or not block.shape[1]:
            return energy * scale**2
        products = block.T @ wide
        basis, rows = torch.cat([basis, block], 1), torch.cat([rows, products])


def _orthonormal(matrix: Tensor, least: float = 0.0) -> Tensor:
    """Orthonormal columns (n, k) of what a matrix (n, m) spans, less directions of a length of at most `least`."""
    import torch

    q, r = torch.linalg.qr(matrix)
    kept: Tensor = q[:, r.diagonal().abs() > least]
    return kept
