"""The contract of importance estimators."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from qratk.registry import Registry

if TYPE_CHECKING:
    from qratk.training.module import FineTuneModule


Measured = Literal["sensitivity", "learnable", "nothing"]
"""What importance may be of: what low bits cost a layer, what an adapter could learn in it, or no look at the layer."""


class ImportanceEstimator(ABC):
    """Scores layers; larger means more important. Used for warm start, proposals and repair, never as a result."""

    component_name: ClassVar[str | None] = None
    """The name that it is registered under; None for a class that is not."""
    measures: ClassVar[Measured] = "sensitivity"
    """What the scores are of: where layers are simulated, an estimator is given the truth of that, blurred."""

    @abstractmethod
    def estimate(
        self, module: FineTuneModule, batches: Sequence[dict[str, Any]], *, lowest_bits: int
    ) -> NDArray[np.float64]:
        """Raw scores, (L,), finite and not negative.

        Called once, before the search, while the module still holds its full-precision weights (all layers at 16
        bits). `batches` are training batches (input_ids, attention_mask, labels); `lowest_bits` is the lowest rung.
        The module's weights, gradients and training mode are left as they were found.
        """

    def by_rung(
        self, module: FineTuneModule, batches: Sequence[dict[str, Any]], *, ladder: Sequence[int]
    ) -> NDArray[np.float64] | None:
        """What each rung of a ladder means to each layer, (L, rungs), finite and not negative; None: the score tells.

        Of bit-widths, where sensitivity is measured, what they cost; of ranks, where the learnable is, what they bring.
        Called in the place of `estimate`, under the same conditions. Programs go by it: the first column of costs and
        the last of gains are the scores. By default None.
        """
        return None


estimators: Registry[ImportanceEstimator] = Registry("estimators", "ImportanceEstimator")
