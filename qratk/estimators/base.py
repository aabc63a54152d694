"""The contract of importance estimators."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from qratk.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from qratk.bank.gradients import BatchSize
    from qratk.training.module import FineTuneModule


Measured = Literal["sensitivity", "learnable", "nothing"]
"""What importance may be of: what low bits cost a layer, what an adapter could learn in it, or no look at the layer."""


class Gathering(ABC):
    """What gathers an estimator's scores while a pass goes over the batches, maybe the same pass for several."""

    @abstractmethod
    def visit(self, name: str, x: Tensor, grad: Tensor, size: BatchSize) -> None:
        """As `qratk.bank.gradients.Visit`: a projection's inputs and the gradients of its outputs, of one batch."""

    @abstractmethod
    def scores(self, sizes: Sequence[BatchSize]) -> NDArray[np.float64]:
        """Raw scores, (L,), once all batches of these sizes were visited."""


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

    def gathering(
        self, module: FineTuneModule, batches: Sequence[dict[str, Any]], *, lowest_bits: int
    ) -> Gathering | None:
        """What gathers the scores of `estimate` in one pass over all of the batches; by default None: there is none.

        Called in the place of `estimate`, under the same conditions, where another estimator looks at the same batches.
        """
        return None

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


def estimate_together(
    asked: Sequence[ImportanceEstimator],
    module: FineTuneModule,
    batches: Sequence[dict[str, Any]],
    *,
    lowest_bits: int,
) -> list[NDArray[np.float64]]:
    """Scores of each estimator, (L,), as `estimate` returns them; those that can share one pass over the batches."""
    gathering = [estimator.gathering(module, batches, lowest_bits=lowest_bits) for estimator in asked]
    sharing = [gathered for gathered in gathering if gathered is not None]
    if len(sharing) < 2:
        return [estimator.estimate(module, batches, lowest_bits=lowest_bits) for estimator in asked]
    from qratk.bank.gradients import stream

    def visit(name: str, x: Tensor, grad: Tensor, size: BatchSize) -> None:
        for gathered in sharing:
            gathered.visit(name, x, grad, size)

    projections = {name: projection for layer in module.backbone.layers for name, projection in layer.modules}
    sizes = stream(module.backbone.model, projections, batches, visit)
    return [
        estimator.estimate(module, batches, lowest_bits=lowest_bits) if gathered is None else gathered.scores(sizes)
        for estimator, gathered in zip(asked, gathering, strict=True)
    ]
