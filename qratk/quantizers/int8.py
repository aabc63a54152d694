"""8 bits, row by row, in the storage layout of bitsandbytes' Linear8bitLt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qratk.core.errors import QuantizationError
from qratk.quantizers._checks import require_finite
from qratk.quantizers.base import AffineGrid, GridForm, PackedBytes, PackedLayer, Quantizer, quantizers

if TYPE_CHECKING:
    import torch
    from torch import nn


@quantizers.register("int8")
@dataclass(frozen=True)
class Int8Quantizer(Quantizer):
    """Symmetric int8 with one float32 absolute maximum a row: n + 4 d_out bytes.

    The layout is that of bitsandbytes (`CB`, `SCB`), the rounding is done in float32: bitsandbytes casts weights to
    float16 first, which loses small ones. Activations are never quantised, so training and evaluation agree.
    """

    @property
    def supported_bits(self) -> tuple[int, ...]:
        """8."""
        return (8,)

    def check(self, shape: tuple[int, int], bits: int) -> None:
        """Raise `QuantizationError` for anything but 8 bits; every shape is taken."""
        if bits != 8:
            raise QuantizationError(f"'int8' does 8 bits, got {bits}; take 'nf4' or 'hqq' for lower ones")

    def quantize(self, weight: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
        """`codes` int8 (d_out, d_in) and `absmax` float32 (d_out,)."""
        import torch

        self.check((weight.shape[0], weight.shape[1]), bits)
        require_finite("int8", weight)
        w = weight.detach().float()
        absmax = w.abs().amax(dim=1)
        inverse = torch.where(absmax > 0, 127.0 / absmax, torch.zeros_like(absmax))
        # A row of subnormal numbers makes 127 / absmax infinite: such a row is zero in any practical type.
        inverse = torch.nan_to_num(inverse, posinf=0.0)
        codes = torch.round(w * inverse.unsqueeze(1)).clamp_(-127, 127).to(torch.int8)
        return {self.CODES: codes, "absmax": absmax}

    def dequantize(
        self, packed: dict[str, torch.Tensor], shape: tuple[int, int], bits: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """Weight (d_out, d_in), bit-equal to what bitsandbytes' `MatMul8bitFp` multiplies by."""
        return packed[self.CODES].to(dtype).mul_(packed["absmax"].unsqueeze(1).mul(1.0 / 127.0))

    def affine_grid(self, packed: dict[str, torch.Tensor], shape: tuple[int, int], bits: int) -> AffineGrid:
        """The codes plus 128, with a group a row."""
        import torch

        codes = (packed[self.CODES].to(torch.int16) + 128).to(torch.uint8)
        scale = packed["absmax"].unsqueeze(1).mul(1.0 / 127.0)
        return AffineGrid(codes, scale, torch.full_like(scale, 128.0), 8, symmetric=True)

    def grid_form(self, bits: int) -> GridForm:
        """One scale a row."""
        return GridForm(None, True, True, "float32")

    def packed_bytes(self, shape: tuple[int, int], bits: int) -> PackedBytes:
        """One byte a weight and four a row."""
        self.check(shape, bits)
        return PackedBytes(shape[0] * shape[1], 4 * shape[0])

    def native_layer(self, layer: PackedLayer) -> nn.Module:
        """A `WeightOnlyLinear8bitLt`, or bitsandbytes' own layer, which quantises activations too."""
        from qratk.quantizers._bitsandbytes import linear_8bit

        def dense(codes: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
            return self.dequantize({self.CODES: codes, "absmax": absmax}, layer.shape, 8, dtype)

        bias, packed = layer.parameters()
        return linear_8bit(packed[self.CODES], packed["absmax"], bias, layer, dense=dense)
