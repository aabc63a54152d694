"""What low bits would cost by the curvature of the loss: average Hessian trace times the quantisation residual."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qratk.core.errors import ConfigurationError
from qratk.estimators.base import ImportanceEstimator, estimators

if TYPE_CHECKING:
    from qratk.training.module import FineTuneModule


@estimators.register("hessian_trace")
class HessianTrace(ImportanceEstimator):
    """Sum over projections W, of n weights, of Tr(H_W) / n * ||W - Q(W)||_F^2, Q at the lowest bits of the ladder.

    HAWQ-V2 (Dong et al. 2020, arXiv:1911.03852). Traces are by Hutchinson's estimator:
    the mean of v^T H v over random signs v. One double backward pass serves all projections of a batch; it holds the
    graph of the first, so give small batches. The Hessian of a model that was not trained to a minimum may have a
    negative trace; a layer's negative sum counts as 0.

    Args:
        samples: vectors of random signs; the error falls with their root.
        max_batches: use at most so many of the batches.
        seed: seed of the random signs.
    """

    def __init__(self, samples: int = 8, max_batches: int | None = None, seed: int = 0) -> None:
        if samples < 1 or (max_batches is not None and max_batches < 1):
            raise ConfigurationError(
                f"hessian_trace: samples and max_batches must be at least 1, got {samples} and {max_batches}"
            )
        self.samples, self.max_batches, self.seed = samples, max_batches, seed

    def estimate(
        self, module: FineTuneModule, batches: Sequence[dict[str, Any]], *, lowest_bits: int
    ) -> NDArray[np.float64]:
        """Scores (L,); the bank must hold the lowest bits. Raises `DataError` when nothing is labelled."""
        from qratk.estimators._curvature import directional_curvatures

        layers = module.backbone.layers
        projections = {name: projection for layer in layers for name, projection in layer.modules}
        seeds = [int(s) for s in np.random.default_rng(self.seed).integers(0, 1 << 62, size=self.samples)]
        curvatures = directional_curvatures(
            module.backbone.model, projections, batches[: self.max_batches], seeds=seeds
        )
        scores = np.zeros(len(layers))
        for number, layer in enumerate(layers):
            for name, projection in layer.modules:
                residual = projection.reference.float() - projection.dequantized(lowest_bits).float()
                scores[number] += float(np.mean(curvatures[name])) * float(residual.square().mean())
        return np.maximum(scores, 0.0)
