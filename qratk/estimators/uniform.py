"""The same importance for every layer: the "no importance" ablation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from qratk.estimators.base import ImportanceEstimator, Measured, estimators

if TYPE_CHECKING:
    from qratk.training.module import FineTuneModule


@estimators.register("uniform")
class Uniform(ImportanceEstimator):
    """One for every layer; looks at no data."""

    measures: ClassVar[Measured] = "nothing"

    def estimate(
        self, module: FineTuneModule, batches: Sequence[dict[str, Any]], *, lowest_bits: int
    ) -> NDArray[np.float64]:
        """Ones, (L,)."""
        return np.ones(len(module.backbone.layers))
