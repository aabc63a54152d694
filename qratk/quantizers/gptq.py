"""2, 3, 4 and 8 bits by GPTQ: the error of each column is made up for by the columns after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qratk.core.errors import ConfigurationError, QuantizationError
from qratk.quantizers._affine import CalibratedAffineQuantizer, nearest_codes
from qratk.quantizers._checks import require_finite
from qratk.quantizers.base import Moments, PackedLayer, quantizers

if TYPE_CHECKING:
    import torch
    from torch import nn

_BLOCK = 128  # columns whose corrections of later ones are applied together


@quantizers.register("gptq")
@dataclass(frozen=True)
class GPTQQuantizer(CalibratedAffineQuantizer):
    """Affine codes that minimise E ||(W - Q(W)) x||^2 greedily, column by column (Frantar et al. 2022).

    Algorithm 1 of arXiv:2210.17323 with H = E[x x^T]. Departures: factors are of float64; inputs that calibration
    never saw keep their weights, rounded to nearest, where the authors' code sets them to zero. Without moments, as in
    `quantize`, it is rounding to nearest.

    Args:
        group_size: weights of a row that share a scale and a zero point; d_in must divide by it.
        metadata_dtype: type of scales and zeros as stored.
        damping: share of the mean diagonal of H that is added to the diagonal.
        activation_order: take the columns by falling diagonal of H, with grids of the unchanged weight; otherwise from
            left to right, with the grid of a group taken when it is reached, after corrections.
    """

    damping: float = 0.01
    activation_order: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.damping <= 1:
            raise ConfigurationError(f"damping must be above 0 and at most 1, as in 0.01; got {self.damping}")

    def native_layer(self, layer: PackedLayer) -> nn.Module:
        """An `HQQLinear`: the same codes, scales and zero points."""
        return self.hqq_layer(layer)

    def quantize_calibrated(self, weight: torch.Tensor, bits: int, moments: Moments) -> dict[str, torch.Tensor]:
        """`codes` uint8 or int32 (packed rows, group_size), `scale` and `zero` (groups, 1)."""
        import torch

        self.check((weight.shape[0], weight.shape[1]), bits)
        require_finite(self._name, weight)
        require_moments(self._name, weight, moments)
        second = moments.second.double()
        columns = torch.arange(weight.shape[1], device=weight.device)
        if self.activation_order:
            columns = torch.argsort(second.diagonal(), descending=True, stable=True)
        factor = inverse_factor(second[columns][:, columns], self.damping).float()
        return self._solve(weight.detach().float(), bits, columns, factor)

    def _solve(
        self, weight: torch.Tensor, bits: int, columns: torch.Tensor, factor: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        import torch

        (d_out, d_in), size = weight.shape, self.group_size
        scale, zero = (t.reshape(d_out, -1) for t in self._grid(weight.reshape(-1, size), bits))
        codes, rest = torch.empty_like(weight), weight[:, columns]
        block = size * max(1, _BLOCK // size)  # whole groups: a grid is taken when all corrections have reached it
        order = columns.tolist()
        for start in range(0, d_in, block):
            stop = min(start + block, d_in)
            errors = torch.empty(d_out, stop - start, device=weight.device)
            for i in range(start, stop):
                column, group = order[i], order[i] // size
                if not self.activation_order and i % size == 0:
                    scale[:, [group]], zero[:, [group]] = self._grid(rest[:, i : i + size], bits)
                step, offset = scale[:, group], zero[:, group]
                codes[:, column] = nearest_codes(rest[:, i], step, offset, bits)
                errors[:, i - start] = (rest[:, i] - (codes[:, column] - offset) * step) / factor[i, i]
                rest[:, i + 1 : stop] -= torch.outer(errors[:, i - start], factor[i, i + 1 : stop])
            rest[:, stop:] -= errors @ factor[start:stop, stop:]
        return self._pack(codes.reshape(-1, size), scale.reshape(-1, 1), zero.reshape(-1, 1), bits)


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
