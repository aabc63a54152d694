"""Fisher information of frozen weights, by rows and columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qratk.adapters.matrices.factors import Weighting
from qratk.bank.gradients import BatchSize, per_sequence, stream
from qratk.bank.linear import BankLinear

_LEAST_WEIGHT = 1e-3  # of the mean weight: what no sequence moved still counts for something


def fisher_weightings(
    model: nn.Module, projections: Mapping[str, BankLinear], batches: Sequence[dict[str, Any]]
) -> dict[str, Weighting]:
    """Weights of the rows and columns of every projection: square roots of the means of the Fisher diagonal.

    The diagonal is the mean over sequences of squared gradients; its row and column means are summed up as the backward
    pass runs, and one gradient of one projection exists at a time. (LQ-LoRA's text takes the means of square roots, its
    code the square roots of means, which its authors found better.) Weights under a thousandth of their mean are raised
    to that; a projection that no token reached has equal weights.
    """
    means = {
        name: (torch.zeros(p.out_features, dtype=torch.float64), torch.zeros(p.in_features, dtype=torch.float64))
        for name, p in projections.items()
    }

    def visit(name: str, x: Tensor, grad: Tensor, size: BatchSize) -> None:
        x, grad = per_sequence(x, grad, name, size.sequences)
        rows, columns = means[name]
        for inputs, gradients in zip(x, grad, strict=True):
            squared = (gradients.float().T @ inputs.float()).square_()
            rows += squared.mean(dim=1, dtype=torch.float64).cpu()
            columns += squared.mean(dim=0, dtype=torch.float64).cpu()

    sizes = stream(model, projections, batches, visit)
    count = sum(size.labelled for size in sizes)
    return {name: Weighting(_weights(rows / count), _weights(cols / count)) for name, (rows, cols) in means.items()}


def _weights(means: Tensor) -> Tensor:
    weights = means.sqrt()
    mean = float(weights.mean())
    return weights.clamp(min=_LEAST_WEIGHT * mean) if mean > 0 else torch.ones_like(weights)
