"""2, 3, 4 and 8 bits by AWQ: input channels that carry more are scaled up before rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qratk.core.errors import ConfigurationError
from qratk.quantizers._affine import CalibratedAffineQuantizer
from qratk.quantizers._checks import require_finite
from qratk.quantizers._compensation import require_moments
from qratk.quantizers.base import Moments, PackedBytes, quantizers

if TYPE_CHECKING:
    import torch

_SMALLEST = 1e-4  # of a channel's magnitude, relative to the largest: keeps scales within float16


@quantizers.register("awq")
@dataclass(frozen=True)
class AWQQuantizer(CalibratedAffineQuantizer):
    """Affine codes of W diag(s), with s = E|x|^alpha and alpha found on a grid (Lin et al. 2023, arXiv:2306.00978).

    Eq. 4-5 there. The authors fold 1 / s into the operation before; here it is kept, in float16, and multiplied out
    when the weight is dequantised, so that every projection has its own and no norm is changed. The objective is
    E ||(W - Q(W)) x||^2 from the whole second moment; alpha = 0 is rounding to nearest, so it is never worse than that
    on the calibration tokens. Clipping is not searched. Without moments, as in `quantize`, s is 1.

    Args:
        group_size: weights of a row that share a scale and a zero point; d_in must divide by it.
        metadata_dtype: type of scales and zeros as stored.
        grid: steps of alpha from 0 to 1.
    """

    grid: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grid < 1:
            raise ConfigurationError(f"grid must be at least 1, as in 20; got {self.grid}")

    def quantize(self, weight: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
        """`codes`, `scale` and `zero` rounded to nearest, and `channel` (d_in,) of ones."""
        import torch

        ones = torch.ones(weight.shape[1], dtype=torch.float16, device=weight.device)
        return {**super().quantize(weight, bits), "channel": ones}

    def quantize_calibrated(self, weight: torch.Tensor, bits: int, moments: Moments) -> dict[str, torch.Tensor]:
        """As `quantize`, with the channel scales of the best alpha."""
        import torch

        shape = (weight.shape[0], weight.shape[1])
        self.check(shape, bits)
        require_finite(self._name, weight)
        require_moments(self._name, weight, moments)
        dense, least = weight.detach().float(), float("inf")
        best: dict[str, torch.Tensor] = {}
        for step in range(self.grid + 1):
            channel = channel_scales(moments.magnitude, step / self.grid)
            packed = {**self._nearest(dense * channel.float(), bits), "channel": channel}
            residual = dense - self.dequantize(packed, shape, bits, torch.float32)
            error = float(((residual @ moments.second) * residual).sum())
            if error < least or not best:
                best, least = packed, error
        return best

    def dequantize(
        self, packed: dict[str, torch.Tensor], shape: tuple[int, int], bits: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """Weight (d_out, d_in): the hqq library's own function, and the channels' scales divided out."""
        return super().dequantize(packed, shape, bits, dtype).div_(packed["channel"].float())

    def affine_grid(self, packed: dict[str, torch.Tensor], shape: tuple[int, int], bits: int) -> None:
        """None: every input channel has a scale of its own besides."""

    def grid_form(self, bits: int) -> None:
        """None, as there is no grid."""

    def packed_bytes(self, shape: tuple[int, int], bits: int) -> PackedBytes:
        """As for every affine quantizer, and two bytes an input channel."""
        affine = super().packed_bytes(shape, bits)
        return PackedBytes(affine.weights, affine.metadata + 2 * shape[1])


def channel_scales(magnitude: torch.Tensor, alpha: float) -> torch.Tensor:
    """E|x|^alpha, (d_in,) float16, with the geometric mean of its largest and smallest value at 1."""
    import torch

    largest = magnitude.max()
    if alpha == 0 or not bool(largest > 0):
        return torch.ones_like(magnitude, dtype=torch.float16)
    scales = (magnitude / largest).clamp(min=_SMALLEST).pow(alpha)
    return (scales / (scales.max() * scales.min()).sqrt()).half()
