"""What low bits would cost: the quantisation residual weighted by the Fisher diagonal (Eq. 24)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from qratk.core.errors import ConfigurationError
from qratk.estimators.base import Gathering, ImportanceEstimator, estimators

if TYPE_CHECKING:
    from torch import Tensor

    from qratk.bank.gradients import BatchSize
    from qratk.training.module import FineTuneModule


_SMALL: Final = 1 << 16  # numbers in a matrix
_KEPT_BYTES: Final = 1 << 29


@estimators.register("fisher_residual")
class FisherResidual(ImportanceEstimator):
    """I_q(l) = sum over projections W of <F_W, (W - Q(W))^2>, Q at the lowest bits of the ladder (Eq. 24).

    F_W is the mean over sequences of the squared gradient of each (squaring the mean gradient of a batch would be
    far smaller: single gradients cancel). One sequence's gradient of one projection exists at a time.

    Args:
        max_batches: use at most so many of the batches.
    """

    def __init__(self, max_batches: int | None = None) -> None:
        if max_batches is not None and max_batches < 1:
            raise ConfigurationError(f"fisher_residual: max_batches must be at least 1, got {max_batches}")
        self.max_batches = max_batches

    def estimate(
        self, module: FineTuneModule, batches: Sequence[dict[str, Any]], *, lowest_bits: int
    ) -> NDArray[np.float64]:
        """Scores (L,); the bank must hold the lowest bits. Raises `DataError` when nothing is labelled."""
        from qratk.bank.gradients import stream

        gathered = _Residuals(module, lowest_bits)
        sizes = stream(module.backbone.model, gathered.projections, batches[: self.max_batches], gathered.visit)
        return gathered.scores(sizes)

    def gathering(
        self, module: FineTuneModule, batches: Sequence[dict[str, Any]], *, lowest_bits: int
    ) -> Gathering | None:
        """Weighted residuals, unless some of the batches are left out."""
        return _Residuals(module, lowest_bits) if len(batches) == len(batches[: self.max_batches]) else None


class _Residuals(Gathering):
    """Squared gradients of single sequences times squared residuals, added up by layer."""

    def __init__(self, module: FineTuneModule, lowest_bits: int) -> None:
        layers = module.backbone.layers
        self.projections = {name: projection for layer in layers for name, projection in layer.modules}
        self._layer_of = {name: number for number, layer in enumerate(layers) for name, _ in layer.modules}
        self._sums = np.zeros(len(layers))
        self._kept: dict[str, Tensor] = {}  # squared residuals, for the next batches
        self._kept_bytes = 0
        self._lowest_bits = lowest_bits

    def visit(self, name: str, x: Tensor, grad: Tensor, size: BatchSize) -> None:
        """Add what the sequences of a batch say of a projection."""
        from qratk.bank.gradients import per_sequence

        x, grad = per_sequence(x, grad, name, size.sequences)
        self._sums[self._layer_of[name]] += _weighted_residual(x, grad, self._squared_residual(name))

    def _squared_residual(self, name: str) -> Tensor:
        if (kept := self._kept.get(name)) is not None:
            return kept
        projection = self.projections[name]
        residual = projection.reference.float() - projection.dequantized(self._lowest_bits).float()
        squared = residual.square_()
        if self._kept_bytes + squared.nbytes <= _KEPT_BYTES:
            self._kept[name] = squared
            self._kept_bytes += squared.nbytes
        return squared

    def scores(self, sizes: Sequence[BatchSize]) -> NDArray[np.float64]:
        """Means over sequences."""
        self._kept = {}
        return self._sums / sum(size.labelled for size in sizes)


def _weighted_residual(x: Tensor, grad: Tensor, squared_residual: Tensor) -> float:
    """Sum over sequences of <G^2, residual^2> with G = grad^T x, (d_out, d_in) of one sequence."""
    import torch

    total, small = 0.0, squared_residual.numel() <= _SMALL
    for inputs, gradients in zip(x, grad, strict=True):
        squared = (gradients.float().T @ inputs.float()).square_()
        if small:
            total += float((squared * squared_residual).sum())
        else:  # without a third matrix, whose memory takes longer to get than all products
            total += float(torch.dot(squared.flatten(), squared_residual.flatten()))
    return total
