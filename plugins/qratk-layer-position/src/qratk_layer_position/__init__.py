"""Layer importance from position alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qratk import ConfigurationError, ImportanceEstimator

if TYPE_CHECKING:
    from qratk import FineTuneModule

__all__ = ["DepthPrior"]


class DepthPrior(ImportanceEstimator):
    """U-shaped importance over depth: the first and last layers count most, whatever the data.

    A layer at depth x in [0, 1] scores middle + (edge - middle) |2x - 1|^power, where the edge is `first` in the
    first half of the model and `last` in the second. A model of one layer scores the larger edge.

    Args:
        first, last: scores of the first and the last layer.
        middle: score at half depth.
        power: 1 is a V; larger ones keep the middle flat.
    """

    def __init__(self, first: float = 1.0, last: float = 1.0, middle: float = 0.1, power: float = 2.0) -> None:
        if min(first, last, middle) < 0:
            raise ConfigurationError(f"depth_prior: scores must not be negative, got {first}, {last} and {middle}")
        if not power > 0:
            raise ConfigurationError(f"depth_prior: power must be positive, got {power}")
        self.first = first
        self.last = last
        self.middle = middle
        self.power = power

    def estimate(
        self, module: FineTuneModule, batches: Sequence[dict[str, Any]], *, lowest_bits: int
    ) -> NDArray[np.float64]:
        """Scores, (L,); neither the weights nor the batches are looked at."""
        num_layers = len(module.backbone.layers)
        if num_layers == 1:
            return np.array([max(self.first, self.last)], dtype=np.float64)
        depth = np.linspace(0.0, 1.0, num_layers)
        edge = np.where(depth <= 0.5, self.first, self.last)
        return self.middle + (edge - self.middle) * np.abs(2 * depth - 1) ** self.power
