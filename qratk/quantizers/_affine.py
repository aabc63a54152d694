"""Affine codes in groups, in the storage layout of the hqq library: what several quantizers have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from qratk.core.errors import ConfigurationError, QuantizationError
from qratk.quantizers._checks import require_finite
from qratk.quantizers._grouped import GroupedQuantizer
from qratk.quantizers.base import AffineGrid, GridForm, PackedBytes, PackedLayer

if TYPE_CHECKING:
    import torch
    from torch import nn

_PER_UNIT = {2: 4, 4: 2, 8: 1}  # codes that share a byte; the number of groups must divide by it
PACKING = {2: "2bit_u8", 3: "3bit_32", 4: "4bit_u8", 8: "8bit_u8"}
_ITEM_SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class AffineQuantizer(GroupedQuantizer):
    """Codes of 2, 3, 4 or 8 bits with a scale and a zero point a group: W = (codes - zero) * scale.

    Groups are consecutive weights of the flattened matrix. Scales and zeros are rounded to `metadata_dtype`, and codes
    are to be taken for the rounded grid; so the footprint does not change with the compute dtype.

    Args:
        group_size: weights that share a scale and a zero point; d_out * d_in must divide by it.
        metadata_dtype: type of scales and zeros as stored.
    """

    metadata_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"

    whole_zeros: ClassVar[bool] = False
    """Whether zero points are whole numbers."""
    smaller_groups: ClassVar[tuple[int, ...]] = (32, 16, 8)

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ConfigurationError(f"group_size must be 2 or more, as in 64; got {self.group_size}")
        if self.metadata_dtype not in _ITEM_SIZES:
            raise ConfigurationError(f"metadata_dtype must be one of {tuple(_ITEM_SIZES)}, got {self.metadata_dtype!r}")

    def check(self, shape: tuple[int, int], bits: int) -> None:
        """Raise `QuantizationError` when the weight does not divide into groups, or groups into bytes."""
        super().check(shape, bits)
        n = shape[0] * shape[1]
        if n % self.group_size:
            raise QuantizationError(
                f"{self._name}: a weight of {shape[0]} x {shape[1]} = {n} does not divide into groups of "
                f"{self.group_size}; give a smaller group_size or another quantizer"
            )
        groups, unit = n // self.group_size, _PER_UNIT.get(bits, 1)
        if groups % unit:
            raise QuantizationError(
                f"{self._name}: {groups} groups of a {shape[0]} x {shape[1]} weight do not divide by {unit}, as "
                f"packing {bits}-bit codes needs; give a smaller group_size or another quantizer"
            )

    def _pack(self, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
        """Packed tensors of codes (groups, group_size) and their grid (groups, 1)."""
        import torch

        metadata = getattr(torch, self.metadata_dtype)
        packed = library().pack[PACKING[bits]](codes)
        return {self.CODES: packed, "scale": scale.to(metadata), "zero": zero.to(metadata)}

    def dequantize(
        self, packed: dict[str, torch.Tensor], shape: tuple[int, int], bits: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """Weight (d_out, d_in), by the hqq library's own function."""
        meta = self.library_meta(packed, shape, bits, dtype)
        dense: torch.Tensor = library().dequantize(packed[self.CODES], meta)
        return dense

    def affine_grid(self, packed: dict[str, torch.Tensor], shape: tuple[int, int], bits: int) -> AffineGrid | None:
        """The codes on their grid; None where groups do not divide rows."""
        if shape[1] % self.group_size:
            return None
        groups = shape[0] * shape[1] // self.group_size
        codes = library().unpack[PACKING[bits]](packed[self.CODES])[:groups].reshape(shape)
        scale, zero = (packed[name].reshape(shape[0], -1) for name in ("scale", "zero"))
        return AffineGrid(codes.byte(), scale, zero.float(), bits)

    def grid_form(self, bits: int) -> GridForm | None:
        """Grids in groups, which divide rows where the weight has the shape for it."""
        return GridForm(self.group_size, self.whole_zeros, False, self.metadata_dtype)

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
            "packing": PACKING[bits],
            "unpack_view_dtype": library().unpack_view_dtype[PACKING[bits]],
            "view_as_float": False,
            "quant_scale": False,
            "quant_zero": False,
            "compute_dtype": dtype,
        }

    def hqq_layer(self, layer: PackedLayer) -> nn.Module:
        """An `HQQLinear` with these codes, scales and zero points."""
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        bias, packed = layer.parameters()
        device = packed[self.CODES].device
        config: dict[str, Any] = BaseQuantizeConfig(nbits=layer.bits, group_size=self.group_size, axis=1)
        module: Any = HQQLinear(None, config, compute_dtype=layer.dtype, device=str(device), initialize=False)
        module.W_q = packed[self.CODES]
        module.meta = self.library_meta(packed, layer.shape, layer.bits, layer.dtype)
        module.bias = bias
        module.cuda(str(device))  # the library's name for "to this device", CPU included
        module.ready = True
        module.out_features, module.in_features = layer.shape  # it sets them only when it quantises or loads
        made: nn.Module = module
        return made

    def packed_bytes(self, shape: tuple[int, int], bits: int) -> PackedBytes:
        """Codes with their padding, and two metadata items a group."""
        self.check(shape, bits)
        groups = shape[0] * shape[1] // self.group_size
        # Ten 3-bit codes share an int32; the rows are padded to a multiple of ten.
        codes = 4 * -(-groups // 10) if bits == 3 else groups // _PER_UNIT[bits]
        return PackedBytes(codes * self.group_size, 2 * groups * _ITEM_SIZES[self.metadata_dtype])


@dataclass(frozen=True)
class CalibratedAffineQuantizer(AffineQuantizer):
    """An affine quantizer that wants moments of its inputs: groups lie within rows, grids follow from the range.

    Zero points are whole numbers, so that 16 bits hold them exactly.
    """

    calibrated: ClassVar[bool] = True
    whole_zeros: ClassVar[bool] = True

    def check(self, shape: tuple[int, int], bits: int) -> None:
        """As for every affine quantizer; and rows (d_in) must divide into groups."""
        super().check(shape, bits)
        if shape[1] % self.group_size:
            raise QuantizationError(
                f"{self._name}: rows of {shape[1]} weights do not divide into groups of {self.group_size}; "
                "give a smaller group_size or another quantizer"
            )

    def quantize(self, weight: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
        """`codes` and their grid, rounded to nearest: what it makes of inputs of which nothing is known."""
        self.check((weight.shape[0], weight.shape[1]), bits)
        require_finite(self._name, weight)
        return self._nearest(weight.detach().float(), bits)

    def _nearest(self, weight: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
        groups = weight.reshape(-1, self.group_size)
        scale, zero = self._grid(groups, bits)
        return self._pack(nearest_codes(groups, scale, zero, bits), scale, zero, bits)

    def _grid(self, groups: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and whole zero point of each group, (groups, 1) float32, as `metadata_dtype` will hold them."""
        import torch

        levels = 2**bits - 1
        low, high = groups.amin(dim=1, keepdim=True).clamp(max=0), groups.amax(dim=1, keepdim=True).clamp(min=0)
        scale = ((high - low) / levels).to(getattr(torch, self.metadata_dtype)).float()
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # a group of zeros
        return scale, torch.round(-low / scale).clamp_(0, levels)


def nearest_codes(groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """Whole codes, as float, of weights on a grid that broadcasts with them."""
    import torch

    codes = torch.round(groups / scale.float() + zero.float()).clamp_(0, 2**bits - 1)
    # A scale that underflows in the metadata type belongs to a group of zeros in all but name.
    return torch.nan_to_num(codes, nan=0.0)


def library() -> Any:
    """The quantizer class of the hqq library."""
    from hqq.core.quantize import Quantizer as Library

    return Library
