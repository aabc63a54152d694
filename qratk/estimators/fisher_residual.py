"""What low bits would cost: the quantisation residual weighted by the Fisher diagonal (Eq. 24)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
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
_SEQUENCES: Final = 16  # whose gradients are looked at, of larger matrices
_KEPT_BYTES: Final = 1 << 29


@estimators.register("fisher_residual")
class FisherResidual(ImportanceEstimator):
    """I_q(l) = sum over projections W of <F_W, (W - Q(W))^2>, Q at the lowest bits of the ladder (Eq. 24).

    F_W is the mean over sequences of the squared gradient of each (squaring the mean gradient of a batch would be
    far smaller: single gradients cancel). One sequence's gradient of one projection exists at a time.

    For weights of more than 65,536 numbers a single gradient takes longer than the sequence's passes through the layer,
    so that the mean is over the first batches with 16 labelled sequences in all. 16 rank the layers of SmolLM2-135M as
    112 others do with a Spearman correlation of .993 (.988 at least), 64 with .996.

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
        chosen = gathered.needed(batches[: self.max_batches])
        sizes = stream(module.backbone.model, gathered.projections, chosen, gathered.visit)
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
        self._large = {name for name, bank in self.projections.items() if math.prod(bank.shape) > _SMALL}
        self._of_large = np.zeros(len(layers))
        self._batch: BatchSize | None = None
        self._before = 0  # labelled sequences of the batches before
        self._kept: dict[str, Tensor] = {}  # squared residuals, for the next batches
        self._kept_bytes = 0
        self._lowest_bits = lowest_bits

    def visit(self, name: str, x: Tensor, grad: Tensor, size: BatchSize) -> None:
        """Add what the sequences of a batch say of a projection."""
        from qratk.bank.gradients import per_sequence

        if size is not self._batch:
            self._before += 0 if self._batch is None else self._batch.labelled
            self._batch = size
        if name in self._large and self._before >= _SEQUENCES:
            self._kept.pop(name, None)
            return
        x, grad = per_sequence(x, grad, name, size.sequences)
        sums = self._of_large if name in self._large else self._sums
        sums[self._layer_of[name]] += _weighted_residual(x, grad, self._squared_residual(name))

    def needed(self, batches: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
        """The batches that are looked at: the first ones alone where all weights are large."""
        if len(self._large) < len(self.projections):
            return batches
        return batches[: _until(int((batch["labels"][:, 1:] != -100).any(dim=1).sum()) for batch in batches)]

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
        labelled = [size.labelled for size in sizes]
        seen = labelled[: _until(labelled)]
        return self._sums / sum(labelled) + self._of_large / sum(seen)


def _until(labelled: Iterable[int]) -> int:
    """Number of batches, with so many labelled sequences each, that large matrices are looked at in."""
    return 1 + sum(count < _SEQUENCES for count in itertools.accumulate(labelled))


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
