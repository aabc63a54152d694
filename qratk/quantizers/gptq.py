"""2, 3, 4 and 8 bits by GPTQ: the error of each column is made up for by the columns after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qratk.core.errors import ConfigurationError
from qratk.quantizers._affine import CalibratedAffineQuantizer, nearest_codes
from qratk.quantizers._checks import require_finite
from qratk.quantizers._compensation import compensated, inverse_factor, require_moments
from qratk.quantizers.base import Moments, PackedLayer, quantizers

if TYPE_CHECKING:
    import torch
    from torch import nn


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
        size = self.group_size
        scale, zero = (t.reshape(len(weight), -1) for t in self._grid(weight.reshape(-1, size), bits))
        codes, scale, zero = compensated(
            weight,
            size,
            factor,
            (scale, zero),
            lambda _, values, step, offset: nearest_codes(values, step, offset, bits),
            columns=columns,
            grid_of=None if self.activation_order else lambda _, group: self._grid(group, bits),
        )
        return self._pack(codes.reshape(-1, size), scale.reshape(-1, 1), zero.reshape(-1, 1), bits)
