"""No quantisation: the weight in a 16-bit floating-point type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from qratk.core.errors import ConfigurationError, QuantizationError
from qratk.quantizers.base import PackedBytes, PackedLayer, Quantizer, quantizers

if TYPE_CHECKING:
    import torch
    from torch import nn


@quantizers.register("none")
@dataclass(frozen=True)
class NoQuantizer(Quantizer):
    """Keeps a weight in 16 bits: 2 bytes each.

    Args:
        dtype: "auto" keeps the checkpoint's own type when it has 16 bits, and takes bfloat16 otherwise.
    """

    dtype: Literal["auto", "bfloat16", "float16"] = "auto"

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", "bfloat16", "float16"):
            raise ConfigurationError(f"dtype must be 'auto', 'bfloat16' or 'float16', got {self.dtype!r}")

    @property
    def supported_bits(self) -> tuple[int, ...]:
        """16."""
        return (16,)

    def check(self, shape: tuple[int, int], bits: int) -> None:
        """Raise `QuantizationError` for anything but 16 bits."""
        if bits != 16:
            raise QuantizationError(f"'none' keeps 16 bits, got {bits}; take another quantizer for lower bits")

    def quantize(self, weight: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
        """The weight, rounded to 16 bits where it has more; shares memory with a 16-bit weight."""
        import torch

        self.check((weight.shape[0], weight.shape[1]), bits)
        auto = weight.dtype if weight.dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
        target = auto if self.dtype == "auto" else getattr(torch, self.dtype)
        return {self.CODES: weight.detach().to(target).contiguous()}

    def dequantize(
        self, packed: dict[str, torch.Tensor], shape: tuple[int, int], bits: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """The stored weight in another type."""
        return packed[self.CODES].to(dtype)

    def packed_bytes(self, shape: tuple[int, int], bits: int) -> PackedBytes:
        """2 bytes a weight."""
        self.check(shape, bits)
        return PackedBytes(2 * shape[0] * shape[1], 0)

    def native_layer(self, layer: PackedLayer) -> nn.Module:
        """An `nn.Linear` in the compute type."""
        from torch import nn

        bias, packed = layer.parameters()
        d_out, d_in = layer.shape
        module = nn.Linear(d_in, d_out, bias=bias is not None, device="meta")
        module.weight = nn.Parameter(packed[self.CODES].to(layer.dtype), requires_grad=False)
        if bias is not None:
            module.bias = nn.Parameter(bias, requires_grad=False)
        return module
