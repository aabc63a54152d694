"""2, 3, 4 and 8 bits by Half-Quadratic Quantization, in the storage layout of the hqq library."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from qratk.core.errors import ConfigurationError, QuantizationError
from qratk.quantizers._checks import require_finite
from qratk.quantizers.base import PackedBytes, Quantizer, quantizers

if TYPE_CHECKING:
    import torch

_PER_UNIT = {2: 4, 4: 2, 8: 1}  # codes that share a byte; the number of groups must divide by it
_PACKING = {2: "2bit_u8", 3: "3bit_32", 4: "4bit_u8", 8: "8bit_u8"}
_ITEM_SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}
_SMALLER_GROUPS = (32, 16, 8)
_LARGEST_INVERSE = 2e4  # codes per unit; the library's cap, which keeps scales within float16
_ITERATIONS, _NORM, _BETA = 20, 0.7, 10.0  # the library's defaults


@quantizers.register("hqq")
@dataclass(frozen=True)
class HQQQuantizer(Quantizer):
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

    group_size: int = 64
    metadata_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    optimize: bool = True

    # The library's layer adds the bias to the finished product; a fused addition differs in the last bit.
    adds_bias_afterwards = True

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ConfigurationError(f"group_size must be 2 or more, as in 64; got {self.group_size}")
        if self.metadata_dtype not in _ITEM_SIZES:
            raise ConfigurationError(f"metadata_dtype must be one of {tuple(_ITEM_SIZES)}, got {self.metadata_dtype!r}")

    @property
    def supported_bits(self) -> tuple[int, ...]:
        """2, 3, 4 and 8. (1 bit is unusable.)"""
        return (2, 3, 4, 8)

    def alternatives(self) -> tuple[HQQQuantizer, ...]:
        """The same with smaller groups, largest first: what to try for a shape that this one cannot take."""
        return tuple(replace(self, group_size=size) for size in _SMALLER_GROUPS if size < self.group_size)

    def check(self, shape: tuple[int, int], bits: int) -> None:
        """Raise `QuantizationError` when the weight does not divide into groups, or groups into bytes."""
        if bits not in self.supported_bits:
            raise QuantizationError(f"'hqq' does {self.supported_bits} bits, got {bits}")
        n = shape[0] * shape[1]
        if n % self.group_size:
            raise QuantizationError(
                f"'hqq': a weight of {shape[0]} x {shape[1]} = {n} does not divide into groups of {self.group_size}; "
                "give a smaller group_size or another quantizer"
            )
        groups, unit = n // self.group_size, _PER_UNIT.get(bits, 1)
        if groups % unit:
            raise QuantizationError(
                f"'hqq': {groups} groups of a {shape[0]} x {shape[1]} weight do not divide by {unit}, as packing "
                f"{bits}-bit codes needs; give a smaller group_size or another quantizer"
            )

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
        codes = torch.round(groups / scale.float() + zero.float()).clamp_(0, 2**bits - 1)
        # A scale that underflows in the metadata type belongs to a group of zeros in all but name.
        codes = torch.nan_to_num(codes, nan=0.0)
        return {self.CODES: _library().pack[_PACKING[bits]](codes), "scale": scale, "zero": zero}

    def _grid(self, groups: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
        # Scale and zero, each (groups, 1) float32: W = (codes - zero) * scale.
        import torch

        low, extent = groups.amin(dim=1, keepdim=True), _extent(groups)
        inverse = torch.where(extent > 0, (2**bits - 1) / extent, torch.ones_like(extent)).clamp(max=_LARGEST_INVERSE)
        zero = -low * inverse
        if self.optimize:
            zero = _optimised_zero(groups, inverse, zero, 2**bits - 1)
        return 1.0 / inverse, zero

    def dequantize(
        self, packed: dict[str, torch.Tensor], shape: tuple[int, int], bits: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """Weight (d_out, d_in), by the hqq library's own function."""
        meta = self.library_meta(packed, shape, bits, dtype)
        dense: torch.Tensor = _library().dequantize(packed[self.CODES], meta)
        return dense

    def library_meta(
        self, packed: dict[str, torch.Tensor], shape: tuple[int, int], bits: int, dtype: torch.dtype
    ) -> dict[str, Any]:
        """The `meta` dictionary of an `HQQLinear` with these packed tensors; scales and zeros in the compute dtype."""
        import torch

        return {
            "nbits": bits,
            "group_size": self.group_size,
            "shape": torch.Size(shape),
            "scale": packed["scale"].to(dtype),
            "zero": packed["zero"].to(dtype),
            "axis": 1,
            "packing": _PACKING[bits],
            "unpack_view_dtype": _library().unpack_view_dtype[_PACKING[bits]],
            "view_as_float": False,
            "quant_scale": False,
            "quant_zero": False,
            "compute_dtype": dtype,
        }

    def packed_bytes(self, shape: tuple[int, int], bits: int) -> PackedBytes:
        """Codes with their padding, and two metadata items a group."""
        self.check(shape, bits)
        groups = shape[0] * shape[1] // self.group_size
        # Ten 3-bit codes share an int32; the rows are padded to a multiple of ten.
        codes = 4 * -(-groups // 10) if bits == 3 else groups // _PER_UNIT[bits]
        return PackedBytes(codes * self.group_size, 2 * groups * _ITEM_SIZES[self.metadata_dtype])


def _library() -> Any:
    from hqq.core.quantize import Quantizer as Library

    return Library


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
