"""What every bit-width does to the loss by the outputs: squared gradients times squared errors (AutoQuantize)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qratk.core.errors import ConfigurationError
from qratk.estimators.base import ImportanceEstimator, estimators

if TYPE_CHECKING:
    from torch import Tensor

    from qratk.training.module import FineTuneModule


@estimators.register("autoquantize")
class AutoQuantize(ImportanceEstimator):
    """Sum over projections and tokens of <(dL / dY)^2, (Y - Y_b)^2>, Y = x W^T, Y_b with W at b bits, for every b.

    The gradient score of `auto_quantize` in NVIDIA's ModelOpt, whose integer program then chooses formats: a second
    order expansion of the loss by a layer's outputs, with the diagonal of the empirical Fisher information in the place
    of the Hessian. Inputs and gradients are those of the full-precision model. The loss is the mean over a sequence's
    labelled tokens, and the score the mean over sequences. Backward passes stop at outputs: no gradient of a weight is
    made.

    Args:
        max_batches: use at most so many of the batches.
    """

    def __init__(self, max_batches: int | None = None) -> None:
        if max_batches is not None and max_batches < 1:
            raise ConfigurationError(f"autoquantize: max_batches must be at least 1, got {max_batches}")
        self.max_batches = max_batches

    def estimate(
        self, module: FineTuneModule, batches: Sequence[dict[str, Any]], *, lowest_bits: int
    ) -> NDArray[np.float64]:
        """Costs of the lowest bits, (L,); the bank must hold them. Raises `DataError` when nothing is labelled."""
        return self.by_rung(module, batches, ladder=[lowest_bits])[:, 0]

    def by_rung(
        self, module: FineTuneModule, batches: Sequence[dict[str, Any]], *, ladder: Sequence[int]
    ) -> NDArray[np.float64]:
        """Costs of all bit-widths of the ladder, (L, bits), which the bank must hold. Raises as `estimate` does."""
        from qratk.bank.gradients import BatchSize, stream

        layers = module.backbone.layers
        projections = {name: projection for layer in layers for name, projection in layer.modules}
        layer_of = {name: number for number, layer in enumerate(layers) for name, _ in layer.modules}
        costs = np.zeros((len(layers), len(ladder)))

        def visit(name: str, x: Tensor, grad: Tensor, size: BatchSize) -> None:
            projection = projections[name]
            reference, x, squared = projection.reference.float(), x.float(), grad.float().square()
            for rung, bits in enumerate(ladder):
                error = x @ (reference - projection.dequantized(bits).float()).T
                costs[layer_of[name], rung] += float((error.square_() * squared).sum())

        sizes = stream(module.backbone.model, projections, batches[: self.max_batches], visit)
        return costs / sum(size.labelled for size in sizes)
