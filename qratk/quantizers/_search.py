"""Grids of groups of weights by trial: the scale and zero point that cost least."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    Loss = Callable[[torch.Tensor], torch.Tensor]
    """Cost (..., groups) of errors (..., groups, group_size)."""

_AT_ONCE = {"cpu": 1 << 17}  # numbers in one step: what the processor's own cache holds
_AT_ONCE_ELSEWHERE = 1 << 24


def whole_range(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and largest weight of each group or zero, (groups, 1)."""
    return groups.amin(dim=1, keepdim=True).clamp(max=0), groups.amax(dim=1, keepdim=True).clamp(min=0)


def rounded_scale(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scale as float32 that a 16-bit type holds; 1 for groups of zeros, or what is zero in that type."""
    import torch

    scale = scale.to(dtype).float()
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def codes_on(
    groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, largest: int | torch.Tensor
) -> torch.Tensor:
    """Whole codes from 0 to `largest`, as float, of weights on a grid; all broadcast."""
    import torch

    codes = (groups / scale).add_(zero).round_()
    return codes.clamp_(0, largest) if isinstance(largest, int) else torch.minimum(codes.clamp_(min=0), largest)


def searched_grid(
    groups: torch.Tensor,
    bits: int,
    *,
    factors: Sequence[float],
    dtype: torch.dtype,
    symmetric: bool = False,
    weights: torch.Tensor | None = None,
    loss: Callable[[torch.Tensor, slice], torch.Tensor] | None = None,
    fit: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and whole zero point of each group, (groups, 1) float32, of the least cost.

    Tried are the scales that come of the range of a group, times each of the factors, each with the two zero points
    next to the exact one (with 2^(bits - 1) where `symmetric`); with `fit`, also the scale of least squares for the
    best one's codes. Scales are those that `dtype` holds. An error costs its square, times that of its place in the
    group where there are `weights` (group_size,); or `loss` makes costs (P, rows) of errors (P, rows, group_size) of a
    slice of the groups. Of equals the first is taken: the widest, as factors fall.
    """
    import torch

    best = []
    step = max(1, _AT_ONCE.get(groups.device.type, _AT_ONCE_ELSEWHERE) // (2 * len(factors) * groups.shape[1]))
    for first in range(0, len(groups), step):
        rows = slice(first, min(first + step, len(groups)))

        def cost(errors: torch.Tensor, rows: slice = rows) -> torch.Tensor:
            return _squared(errors, weights) if loss is None else loss(errors, rows)

        scale, zero, codes = _best(groups[rows], bits, factors, dtype, symmetric, cost)
        if fit:
            scale = _fitted(groups[rows], scale, zero, codes, 2**bits - 1, dtype, weights)
        best.append((scale, zero))
    scales, zeros = zip(*best, strict=True)
    return torch.cat(scales), torch.cat(zeros)


def _best(
    groups: torch.Tensor, bits: int, factors: Sequence[float], dtype: torch.dtype, symmetric: bool, cost: Loss
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scale and zero point (rows, 1), and codes less the zero point (rows, group_size)."""
    import torch

    largest = 2**bits - 1
    low, high = whole_range(groups)
    times = torch.tensor(factors, device=groups.device).reshape(-1, 1, 1)
    if symmetric:
        half = float(2 ** (bits - 1))
        scale = rounded_scale(times * torch.maximum(-low / half, high / (half - 1)), dtype)
        zero = torch.full_like(scale, half)
    else:
        scale = rounded_scale(times * (high - low) / largest, dtype)
        exact = (-low / ((high - low) / largest)).nan_to_num_(nan=0.0).expand_as(scale)
        scale = torch.cat([scale, scale])
        zero = torch.cat([exact.round(), exact.floor() + exact.ceil() - exact.round()]).clamp_(0, largest)
    codes = codes_on(groups, scale, zero, largest).sub_(zero)
    costs = cost(torch.addcmul(groups.expand_as(codes), codes, scale, value=-1))  # (P, rows)
    index = costs.argmin(dim=0).reshape(1, -1, 1)
    chosen = codes.gather(0, index.expand(1, -1, codes.shape[2]))[0]
    return scale.gather(0, index)[0], zero.gather(0, index)[0], chosen


def _fitted(
    groups: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    codes: torch.Tensor,
    largest: int,
    dtype: torch.dtype,
    weights: torch.Tensor | None,
) -> torch.Tensor:
    """The scale, or that of least squares for its codes where that costs less."""
    import torch

    own = codes if weights is None else codes * weights
    products, squares = ((own * other).sum(dim=1, keepdim=True) for other in (groups, codes))
    fitted = rounded_scale(products / squares, dtype)
    anew = codes_on(groups, fitted, zero, largest).sub_(zero)
    better = _squared(groups - anew * fitted, weights) < _squared(groups - codes * scale, weights)
    return torch.where(better[:, None], fitted, scale)


def _squared(errors: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    squares = errors.square()
    return (squares if weights is None else squares * weights).sum(dim=-1)
