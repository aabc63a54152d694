"""What low bits do to the weights alone: the squared quantisation residual, without any data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qratk.estimators.base import ImportanceEstimator, estimators

if TYPE_CHECKING:
    from qratk.bank.linear import BankLinear
    from qratk.training.module import FineTuneModule


@estimators.register("quantization_error")
class QuantizationError(ImportanceEstimator):
    """Sum over projections W of ||W - Q(W)||_F^2, Q at the lowest bits of the ladder; looks at no batch.

    Args:
        relative: divide each by ||W||_F^2, so that a layer of large weights counts no more than one of small ones.
    """

    def __init__(self, relative: bool = False) -> None:
        self.relative = relative

    def estimate(
        self, module: FineTuneModule, batches: Sequence[dict[str, Any]], *, lowest_bits: int
    ) -> NDArray[np.float64]:
        """Scores (L,); the bank must hold the lowest bits."""
        return np.array(
            [
                sum(self._error(projection, lowest_bits) for _, projection in layer.modules)
                for layer in module.backbone.layers
            ],
            dtype=np.float64,
        )

    def _error(self, projection: BankLinear, bits: int) -> float:
        weight = projection.reference.float()
        error = float((weight - projection.dequantized(bits).float()).square().sum())
        if not self.relative:
            return error
        size = float(weight.square().sum())
        return error / size if size > 0 else 0.0
