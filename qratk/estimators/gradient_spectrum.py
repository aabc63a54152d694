"""What an adapter could learn: the leading spectral energy of the mean gradient (Eq. 25, 26)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from qratk.core.errors import ConfigurationError
from qratk.core.memory import parse_bytes
from qratk.estimators.base import ImportanceEstimator, Measured, estimators

if TYPE_CHECKING:
    from torch import Tensor

    from qratk.training.module import FineTuneModule


@estimators.register("gradient_spectrum")
class GradientSpectrum(ImportanceEstimator):
    """I_r(l) = sum over projections of the largest `components` squared singular values of the mean gradient.

    The gradient is that of the projection's own weight, averaged over the batches (Eq. 25: the K steps of a probe;
    the weights stay as they are, so that the result does not depend on a learning rate). Dense mean gradients are
    held for as many projections at a time as `gradient_memory` allows; the batches are gone through once for each
    such chunk.

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

        layers = module.backbone.layers
        layer_of = {name: number for number, layer in enumerate(layers) for name, _ in layer.modules}
        projections = [projection for layer in layers for projection in layer.modules]
        scores = np.zeros(len(layers))
        chosen = batches[: self.max_batches]
        for name, gradient in mean_gradients(module.backbone.model, projections, chosen, self.gradient_bytes):
            scores[layer_of[name]] += spectral_energy(gradient, self.components)
        return scores


def spectral_energy(matrix: Tensor, components: int) -> float:
    """Sum of the largest squared singular values of a matrix: eigenvalues of the smaller Gram matrix, in float64."""
    import torch

    matrix = matrix.double()
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    # Rounding may turn a zero eigenvalue negative.
    return float(torch.linalg.eigvalsh(gram)[-components:].clamp(min=0).sum())
