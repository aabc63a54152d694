"""Quantising and approximating in turn: what LoftQ and LQ-LoRA have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from qratk.adapters.matrices.factors import Directions, Factors, Weighting, expanded, low_rank
from qratk.adapters.starts.base import Residual
from qratk.bank.linear import Packed


def alternated(residual: Residual, rank: int, iterations: int) -> tuple[Packed, Factors]:
    """Packed weight and factors after Q <- q(W - B A) and B, A <- low rank of W - Q in turn (LoftQ, Algorithm 1).

    The quantised W itself is where the alternation begins. With a weighting (LQ-LoRA, Algorithm 1) it ends as soon as
    the weighted error rises, with what was there before; without one after all iterations, as in PEFT.
    """
    chosen, weighting, group = residual.chosen, residual.weighting, residual.group
    assert not isinstance(weighting, Directions)  # it is what the start itself asked for
    weight = residual.weight.float()
    best: tuple[Packed, Factors] | None = None
    lowest = float("inf")
    packed = residual.packed
    for iteration in range(iterations):
        if iteration:
            assert best is not None
            packed = chosen.quantizer.quantize((weight - _product(best[1], group, weight)).contiguous(), chosen.bits)
        missing = weight - chosen.quantizer.dequantize(packed, _shape(weight), chosen.bits, torch.float32)
        factors = low_rank(missing, rank, weighting=weighting, group=group)
        if weighting is not None:
            error = _weighted_norm(missing - _product(factors, group, weight), weighting)
            if error > lowest:
                break
            lowest = error
        best = packed, factors
    assert best is not None
    return best


def _shape(weight: Tensor) -> tuple[int, int]:
    return (weight.shape[0], weight.shape[1])


def _product(factors: Factors, group: int, like: Tensor) -> Tensor:
    return factors.b.to(like.device) @ expanded(factors.a.to(like.device), group)


def _weighted_norm(error: Tensor, weighting: Weighting) -> float:
    rows, columns = weighting.rows.to(error.device), weighting.columns.to(error.device)
    return float(torch.linalg.vector_norm(error.double() * rows[:, None] * columns))
