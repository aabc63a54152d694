"""How much the loss would gain from a small change of a layer's weights: the squared norm of their gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from qratk.core.errors import ConfigurationError
from qratk.core.memory import parse_bytes
from qratk.estimators.base import ImportanceEstimator, Measured, estimators

if TYPE_CHECKING:
    from torch import Tensor

    from qratk.training.module import FineTuneModule


@estimators.register("gradient_norm")
class GradientNorm(ImportanceEstimator):
    """Sum over projections of ||G||_F^2: `gradient_spectrum` with all of the spectrum.

    Args:
        of: "mean" takes the gradient averaged over the batches, as `gradient_spectrum` does; "sequences" the mean over
            sequences of the squared norm of each one's gradient (the trace of the empirical Fisher matrix), which
            does not shrink where sequences disagree, and needs no dense gradient.
        max_batches: use at most so many of the batches.
        gradient_memory: bytes of float32 gradients held at a time for "mean", e.g. "1GiB"; one projection always fits.
    """

    measures: ClassVar[Measured] = "learnable"

    def __init__(
        self,
        of: Literal["mean", "sequences"] = "mean",
        max_batches: int | None = None,
        gradient_memory: str | int = "1GiB",
    ) -> None:
        if of not in ("mean", "sequences"):
            raise ConfigurationError(f"gradient_norm: 'of' must be 'mean' or 'sequences', got {of!r}")
        if max_batches is not None and max_batches < 1:
            raise ConfigurationError(f"gradient_norm: max_batches must be at least 1, got {max_batches}")
        self.of, self.max_batches = of, max_batches
        self.gradient_bytes = parse_bytes(gradient_memory)

    def estimate(
        self, module: FineTuneModule, batches: Sequence[dict[str, Any]], *, lowest_bits: int
    ) -> NDArray[np.float64]:
        """Scores (L,). Raises `DataError` when nothing is labelled."""
        chosen = batches[: self.max_batches]
        return self._of_mean(module, chosen) if self.of == "mean" else _of_sequences(module, chosen)

    def _of_mean(self, module: FineTuneModule, batches: Sequence[dict[str, Any]]) -> NDArray[np.float64]:
        from qratk.bank.gradients import mean_gradients

        layers = module.backbone.layers
        layer_of = {name: number for number, layer in enumerate(layers) for name, _ in layer.modules}
        projections = [projection for layer in layers for projection in layer.modules]
        scores = np.zeros(len(layers))
        for name, gradient in mean_gradients(module.backbone.model, projections, batches, self.gradient_bytes):
            scores[layer_of[name]] += float(gradient.square().sum())
        return scores


def _of_sequences(module: FineTuneModule, batches: Sequence[dict[str, Any]]) -> NDArray[np.float64]:
    from qratk.bank.gradients import BatchSize, per_sequence, stream

    layers = module.backbone.layers
    projections = {name: projection for layer in layers for name, projection in layer.modules}
    layer_of = {name: number for number, layer in enumerate(layers) for name, _ in layer.modules}
    sums = np.zeros(len(layers))

    def visit(name: str, x: Tensor, grad: Tensor, size: BatchSize) -> None:
        sums[layer_of[name]] += _squared_norms(*per_sequence(x, grad, name, size.sequences))

    sizes = stream(module.backbone.model, projections, batches, visit)
    return sums / sum(size.labelled for size in sizes)


def _squared_norms(x: Tensor, grad: Tensor) -> float:
    """Sum over sequences of ||grad^T x||_F^2 = <x x^T, grad grad^T>: (T, T) instead of (d_out, d_in)."""
    x, grad = x.float(), grad.float()
    return float(((x @ x.mT) * (grad @ grad.mT)).sum())
