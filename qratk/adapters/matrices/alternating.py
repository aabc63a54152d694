"""Quantising and approximating in turn: what starts have in common."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qratk.adapters.matrices.covariance import product
from qratk.adapters.matrices.factors import Directions, Factors, Weighting, low_rank
from qratk.adapters.starts.base import Residual
from qratk.bank.linear import Packed


def alternated(
    residual: Residual,
    rank: int,
    iterations: int,
    *,
    approximated: Callable[[Tensor], Factors] | None = None,
    cost: Callable[[Tensor], float] | None = None,
) -> tuple[Packed, Factors]:
    """Packed weight and factors after Q <- q(W - B A) and B, A <- low rank of W - Q in turn (LoftQ, Algorithm 1).

    The quantised W itself is where the alternation begins. With a cost of the error that is left, or a weighting
    (LQ-LoRA, Algorithm 1), it ends as soon as that rises, with what was there before; without one after all iterations,
    as in PEFT. `approximated` makes factors of W - Q, by default by singular values under the weighting.
    """
    chosen, weighting, group = residual.chosen, residual.weighting, residual.group
    assert not isinstance(weighting, Directions)  # it is what the start itself asked for
    weight = residual.weight.float()
    if cost is None and weighting is not None:
        cost = _weighting_cost(weighting)
    best: tuple[Packed, Factors] | None = None
    lowest = float("inf")
    packed = residual.packed
    for iteration in range(iterations):
        if iteration:
            assert best is not None
            packed = chosen.quantizer.quantize((weight - product(best[1], group, weight)).contiguous(), chosen.bits)
        missing = weight - chosen.quantizer.dequantize(packed, _shape(weight), chosen.bits, torch.float32)
        if approximated is None:
            factors = low_rank(missing, rank, weighting=weighting, group=group)
        else:
            factors = approximated(missing)
        if cost is not None:
            error = cost(missing - product(factors, group, weight))
            if error > lowest:
                break
            lowest = error
        best = packed, factors
    assert best is not None
    return best


def _shape(weight: Tensor) -> tuple[int, int]:
    return (weight.shape[0], weight.shape[1])


def _weighting_cost(weighting: Weighting) -> Callable[[Tensor], float]:
    def cost(error: Tensor) -> float:
        rows, columns = weighting.rows.to(error.device), weighting.columns.to(error.device)
        return float(torch.linalg.vector_norm(error.double() * rows[:, None] * columns))

    return cost
