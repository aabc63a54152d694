"""What an adapter of a rank could read of a layer's inputs: the share of their variance (EVA)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from qratk.core.errors import ConfigurationError
from qratk.estimators.base import ImportanceEstimator, Measured, estimators

if TYPE_CHECKING:
    from qratk.training.module import FineTuneModule


@estimators.register("explained_variance")
class ExplainedVariance(ImportanceEstimator):
    """Sum over projections of the share of their inputs' variance that the first r principal directions have.

    EVA (Paischer et al. 2024, arXiv:2410.07170, section 3) deals a number of ranks out to the directions of all
    projections by these shares, the largest first, and has no look at the task. The integer program that chooses ranks
    by them does the same with bytes in the place of ranks. Best with `granularity: linear`, where each projection has a
    rank of its own, and with the start `eva`.

    Args:
        components: directions that the score of a layer counts, where ranks are not told apart.
        max_batches: use at most so many of the batches.
    """

    measures: ClassVar[Measured] = "learnable"

    def __init__(self, components: int = 8, max_batches: int | None = None) -> None:
        if components < 1 or (max_batches is not None and max_batches < 1):
            raise ConfigurationError("explained_variance: components and max_batches must be at least 1")
        self.components, self.max_batches = components, max_batches

    def estimate(
        self, module: FineTuneModule, batches: Sequence[dict[str, Any]], *, lowest_bits: int
    ) -> NDArray[np.float64]:
        """Shares of `components` directions, (L,). Raises `DataError` when there are no tokens."""
        return self.by_rung(module, batches, ladder=[self.components])[:, 0]

    def by_rung(
        self, module: FineTuneModule, batches: Sequence[dict[str, Any]], *, ladder: Sequence[int]
    ) -> NDArray[np.float64]:
        """Shares of as many directions as each rank of the ladder has, (L, ranks). Raises as `estimate` does."""
        from qratk.adapters.matrices.principal import variances

        layers = module.backbone.layers
        projections = {name: projection for layer in layers for name, projection in layer.modules}
        layer_of = {name: number for number, layer in enumerate(layers) for name, _ in layer.modules}
        gains = np.zeros((len(layers), len(ladder)))
        for name, along in variances(module.backbone.model, projections, batches[: self.max_batches]):
            explained = np.concatenate([[0.0], np.cumsum(along.numpy())])
            places = np.minimum(np.asarray(ladder), len(along))
            gains[layer_of[name]] += explained[places] / (explained[-1] or 1.0)
        return gains
