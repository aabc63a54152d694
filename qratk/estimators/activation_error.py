"""What low bits do to the outputs: the mean squared output error of each projection on calibration tokens."""

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


@estimators.register("activation_error")
class ActivationError(ImportanceEstimator):
    """Sum over projections W of E ||(W - Q(W)) x||^2, Q at the lowest bits, x the inputs at full precision.

    This is the objective of layer-wise quantisers (Frantar et al. 2022, arXiv:2210.17323, Eq. 1), exact: not only the
    diagonal of E[x x^T]. The mean is over all tokens but padding. Forward passes only, one residual at a time.

    Args:
        relative: divide each by E ||W x||^2: outputs of other sizes are compared by their share of noise.
        max_batches: use at most so many of the batches.
    """

    def __init__(self, relative: bool = False, max_batches: int | None = None) -> None:
        if max_batches is not None and max_batches < 1:
            raise ConfigurationError(f"activation_error: max_batches must be at least 1, got {max_batches}")
        self.relative, self.max_batches = relative, max_batches

    def estimate(
        self, module: FineTuneModule, batches: Sequence[dict[str, Any]], *, lowest_bits: int
    ) -> NDArray[np.float64]:
        """Scores (L,); the bank must hold the lowest bits. Raises `DataError` when there are no tokens."""
        from qratk.bank.calibration import stream_inputs

        layers = module.backbone.layers
        projections = {name: projection for layer in layers for name, projection in layer.modules}
        layer_of = {name: number for number, layer in enumerate(layers) for name, _ in layer.modules}
        errors, sizes = dict.fromkeys(projections, 0.0), dict.fromkeys(projections, 0.0)

        def visit(name: str, x: Tensor) -> None:
            weight = projections[name].reference.float()
            residual = weight - projections[name].dequantized(lowest_bits).float()
            errors[name] += float((x.float() @ residual.T).square().sum())
            if self.relative:
                sizes[name] += float((x.float() @ weight.T).square().sum())

        tokens = stream_inputs(module.backbone.model, projections, batches[: self.max_batches], visit)
        scores = np.zeros(len(layers))
        for name, error in errors.items():
            size = sizes[name] if self.relative else tokens
            scores[layer_of[name]] += error / size if size > 0 else 0.0
        return scores
