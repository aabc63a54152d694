"""2, 3, 4 and 8 bits by Half-Quadratic Quantization, in the storage layout of the hqq library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qratk.quantizers._affine import AffineQuantizer, nearest_codes
from qratk.quantizers._checks import require_finite
from qratk.quantizers.base import PackedLayer, quantizers

if TYPE_CHECKING:
    import torch
    from torch import nn

_LARGEST_INVERSE = 2e4  # codes per unit; the library's cap, which keeps scales within float16
_ITERATIONS, _NORM, _BETA = 20, 0.7, 10.0  # the library's defaults


@quantizers.register("hqq")
@dataclass(frozen=True)
class HQQQuantizer(AffineQuantizer):
    """Affine codes in groups, zero points optimised by half-quadratic splitting.

    Scales and zeros are rounded to `metadata_dtype` and the codes are then taken for the rounded grid, so that the
    rounding costs next to nothing even at 8 bits, and the footprint does not change with the compute dtype. The
    library destroys groups with a range under 1e-4 (it forces their scale to 1), and caps the scale of other small
    ones: here a power of two is taken out of such groups first.

    Args:
        group_size: weights that share a scale and a zero point; d_out * d_in must divide by it.
        metadata_dtype: type of scales and zeros as stored.
        optimize: whether zero points are optimised (20 iterations) or follow from the range.
    """

    optimize: bool = True

    def quantize(self, weight: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
        """`codes` uint8 or int32 (packed rows, group_size), `scale` and `zero` (groups, 1)."""
        import torch

        shape = (weight.shape[0], weight.shape[1])
        self.check(shape, bits)
        groups = weight.detach().float().reshape(-1, self.group_size)  # (groups, group_size): axis 1 of the library
        require_finite("hqq", weight)
        factor = _power_of_two(groups, bits)
        scale, zero = self._grid(groups * factor, bits)
        metadata = getattr(torch, self.metadata_dtype)
        scale, zero = (scale / factor).to(metadata), zero.to(metadata)
        return self._pack(nearest_codes(groups, scale, zero, bits), scale, zero, bits)

    def native_layer(self, layer: PackedLayer) -> nn.Module:
        """An `HQQLinear`."""
        return self.hqq_layer(layer)

    def _grid(self, groups: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
        # Scale and zero, each (groups, 1) float32: W = (codes - zero) * scale.
        import torch

        low, extent = groups.amin(dim=1, keepdim=True), _extent(groups)
        inverse = torch.where(extent > 0, (2**bits - 1) / extent, torch.ones_like(extent)).clamp(max=_LARGEST_INVERSE)
        zero = -low * inverse
        if self.optimize:
            zero = _optimised_zero(groups, inverse, zero, 2**bits - 1)
        return 1.0 / inverse, zero


def _extent(groups: torch.Tensor) -> torch.Tensor:
    return groups.amax(dim=1, keepdim=True) - groups.amin(dim=1, keepdim=True)


def _power_of_two(groups: torch.Tensor, bits: int) -> torch.Tensor:
    """Factor for each group, (groups, 1): 1, or the power of two that brings a tiny range to [0.5, 1)."""
    import torch

    extent = _extent(groups)
    tiny = (extent > 0) & (extent <= max(1e-4, (2**bits - 1) / _LARGEST_INVERSE))
    _, exponent = torch.frexp(extent)
    return torch.where(tiny, torch.ldexp(torch.ones_like(extent), (-exponent).clamp(max=100)), torch.ones_like(extent))


def _optimised_zero(groups: torch.Tensor, inverse: torch.Tensor, zero: torch.Tensor, largest: int) -> torch.Tensor:
    """Zero points (groups, 1) after half-quadratic splitting with an l_0.7 loss.

    The same steps as the library's `optimize_weights_proximal`, equal to the bit on CPU, but always in float32: the
    library takes float16 on CUDA, and the bank should not depend on where it is built.
    """
    import torch

    best = float("inf")
    for _ in range(_ITERATIONS):  # in place: three tensors of the size of the weight beside it
        codes = (groups * inverse).add_(zero).round_().clamp_(0, largest)
        residual = (codes - zero).div_(inverse)
        torch.sub(groups, residual, out=residual)
        size = residual.abs()
        error = float(size.mean())
        shrunk = size.pow(_NORM - 1.0).mul_(1.0 / _BETA)
        sparse = torch.sub(size, shrunk, out=size).relu_().mul_(residual.sign_())
        torch.sub(groups, sparse, out=sparse).mul_(inverse)
        zero = torch.mean(codes.sub_(sparse), dim=1, keepdim=True)
        if not error < best:
            break
        best = error
    return zero
