"""GPTQ's solver: columns are rounded one after the other, and those that come later make up for the errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from qratk.core.errors import QuantizationError

if TYPE_CHECKING:
    import torch

    from qratk.quantizers.base import Moments

    Grid = tuple[torch.Tensor, torch.Tensor]
    GridOf = Callable[[int, torch.Tensor], Grid]
    """Scale and zero point (d_out, 1) of a group by its index and its weights (d_out, group_size)."""
    CodesOf = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    """Codes (d_out,) of a column: the index of its group, its weights, its scale and its zero point, each (d_out,)."""

_BLOCK = 128  # columns whose corrections of later ones are applied together


def compensated(
    weight: torch.Tensor,
    size: int,
    factor: torch.Tensor,
    grids: Grid,
    codes_of: CodesOf,
    *,
    columns: torch.Tensor | None = None,
    grid_of: GridOf | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes (d_out, d_in) and scales and zero points (d_out, groups) of a weight (Frantar et al. 2022, Algorithm 1).

    `factor` is that of the inverse second moment of the inputs, see `inverse_factor`, in the order of `columns`, which
    is that of the weight by default. `grids` are there for all groups; with `grid_of`, which wants the order of the
    weight, each is taken anew when its group is reached, after corrections.
    """
    import torch

    d_out, d_in = weight.shape
    scale, zero = grids
    order = list(range(d_in)) if columns is None else columns.tolist()
    codes = torch.empty_like(weight)
    rest = weight.clone() if columns is None else weight[:, columns]
    block = size * max(1, _BLOCK // size)  # whole groups: a grid is taken when all corrections have reached it
    for start in range(0, d_in, block):
        stop = min(start + block, d_in)
        errors = torch.empty(d_out, stop - start, device=weight.device)
        for i in range(start, stop):
            column, group = order[i], order[i] // size
            if grid_of is not None and i % size == 0:
                scale[:, [group]], zero[:, [group]] = grid_of(group, rest[:, i : i + size])
            step, offset = scale[:, group], zero[:, group]
            codes[:, column] = codes_of(group, rest[:, i], step, offset)
            errors[:, i - start] = (rest[:, i] - (codes[:, column] - offset) * step) / factor[i, i]
            rest[:, i + 1 : stop] -= torch.outer(errors[:, i - start], factor[i, i + 1 : stop])
        rest[:, stop:] -= errors @ factor[start:stop, stop:]
    return codes, scale, zero


def inverse_factor(second: torch.Tensor, damping: float) -> torch.Tensor:
    """Upper triangular U with U^T U the inverse of the damped second moment, (d_in, d_in).

    The damping is raised tenfold until there is one, as rounding may leave a matrix that is not positive definite.
    """
    import torch

    diagonal = second.diagonal()
    mean = float(diagonal.mean())
    unseen = torch.where(diagonal > 0, torch.zeros_like(diagonal), torch.ones_like(diagonal)) * (mean or 1.0)
    while damping <= 1e3:
        damped = second + torch.diag(unseen + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            upper: torch.Tensor
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not bool(failed):
                return upper
        damping *= 10
    raise QuantizationError("the second moment of a projection's inputs is not positive semi-definite")


def require_moments(name: str, weight: torch.Tensor, moments: Moments) -> None:
    """Raise `QuantizationError` when moments are not of a weight's inputs, or not finite."""
    d_in = weight.shape[1]
    if tuple(moments.second.shape) != (d_in, d_in) or tuple(moments.magnitude.shape) != (d_in,):
        raise QuantizationError(
            f"{name}: moments of {tuple(moments.second.shape)} and {tuple(moments.magnitude.shape)} are not those of "
            f"the {d_in} inputs of a {weight.shape[0]} x {d_in} weight"
        )
    if not bool(moments.second.isfinite().all() & moments.magnitude.isfinite().all()):
        raise QuantizationError(f"{name}: the inputs of a {weight.shape[0]} x {d_in} weight are not all finite")
