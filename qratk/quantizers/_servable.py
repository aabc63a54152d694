"""Affine codes with whole zero points, in the layout that servers read: what several quantizers have in common."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from qratk.core.errors import ConfigurationError, QuantizationError
from qratk.quantizers._grouped import GroupedQuantizer
from qratk.quantizers.base import AffineGrid, GridForm, PackedBytes, PackedLayer

if TYPE_CHECKING:
    import torch
    from torch import nn

_FACTORS = tuple(1.0 - 0.04 * step for step in range(16))  # of the range; a Gaussian group at 2 bits is best at 0.6
_FACTORS_OF_MANY_BITS = (1.0, 0.98, 0.96)


@dataclass(frozen=True)
class ServableQuantizer(GroupedQuantizer):
    """Codes of 2, 3, 4 or 8 bits with a 16-bit scale and a whole zero point a group: W = (codes - zero) * scale.

    Groups are consecutive weights of a row. The tensors are those of compressed-tensors' `pack-quantized` form, which
    is GPTQ's grid: `codes` int32 (d_out, ceil(d_in * bits / 32)), a stream along each row, least significant bit first;
    `scale` (d_out, d_in / group_size); `zero` int32 (ceil(d_out * bits / 32), d_in / group_size), a stream along each
    column. A 3-bit code takes 3 bits, a zero point as many as a code.

    Args:
        group_size: weights of a row that share a scale and a zero point; d_in must divide by it. Servers take 32, 64
            and 128.
        symmetric: no zero points are stored; they are 2^(bits - 1), which more kernels multiply by.
        metadata_dtype: type of scales. In float16 a scale cannot be under 6e-8: smaller weights become zero.
        clip: "mse" tries narrower ranges of each group for the least squared error; "unbiased" does, and then times all
            scales of a matrix with what makes <Q, W> = <W, W>: least squares shortens weights, and with them what every
            projection gives; "none" takes the whole range.
    """

    symmetric: bool = False
    metadata_dtype: Literal["float16", "bfloat16"] = "float16"
    clip: Literal["mse", "unbiased", "none"] = "mse"

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ConfigurationError(f"group_size must be 2 or more, as in 64; got {self.group_size}")
        if self.metadata_dtype not in ("float16", "bfloat16"):
            raise ConfigurationError(f"metadata_dtype must be 'float16' or 'bfloat16', got {self.metadata_dtype!r}")
        if self.clip not in ("mse", "unbiased", "none"):
            raise ConfigurationError(f"clip must be 'mse', 'unbiased' or 'none', got {self.clip!r}")

    def check(self, shape: tuple[int, int], bits: int) -> None:
        """Raise `QuantizationError` when rows do not divide into groups."""
        super().check(shape, bits)
        if shape[1] % self.group_size:
            raise QuantizationError(
                f"{self._name}: rows of {shape[1]} weights do not divide into groups of {self.group_size}; "
                "give a smaller group_size or another quantizer"
            )

    def _grid(
        self, groups: torch.Tensor, bits: int, weights: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point of each group, (groups, 1) float32; errors may have weights by place, (group_size,)."""
        import torch

        from qratk.quantizers._search import searched_grid

        factors = (1.0,) if self.clip == "none" else _FACTORS if bits <= 4 else _FACTORS_OF_MANY_BITS
        dtype = getattr(torch, self.metadata_dtype)
        return searched_grid(
            groups,
            bits,
            factors=factors,
            dtype=dtype,
            symmetric=self.symmetric,
            weights=weights,
            fit=self.clip != "none",
        )

    def _nearest(self, weight: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
        from qratk.quantizers._search import codes_on

        groups = weight.reshape(-1, self.group_size)
        scale, zero = self._grid(groups, bits)
        codes = codes_on(groups, scale, zero, 2**bits - 1)
        if self.clip == "unbiased":
            along = ((codes - zero) * scale * groups).sum()
            scale = scale * groups.square().sum() / along if along > 0 else scale
        return self._packed(codes.reshape(weight.shape), scale, zero, bits)

    def _packed(
        self, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int
    ) -> dict[str, torch.Tensor]:
        """Packed tensors of codes (d_out, d_in) and the grids of all groups in the order of the weights."""
        import torch

        from qratk.quantizers.bitstream import pack_words

        scale, zero = (tensor.reshape(len(codes), -1) for tensor in (scale, zero))
        packed = {self.CODES: pack_words(codes, bits), "scale": scale.to(getattr(torch, self.metadata_dtype))}
        return packed if self.symmetric else {**packed, "zero": pack_words(zero.t(), bits).t().contiguous()}

    def _codes(self, packed: dict[str, torch.Tensor], shape: tuple[int, int], bits: int) -> torch.Tensor:
        from qratk.quantizers.bitstream import unpack_words

        return unpack_words(packed[self.CODES], bits, shape[1])

    def _zeros(self, packed: dict[str, torch.Tensor], shape: tuple[int, int], bits: int) -> torch.Tensor:
        import torch

        from qratk.quantizers.bitstream import unpack_words

        if self.symmetric:
            return torch.full_like(packed["scale"], 2 ** (bits - 1), dtype=torch.uint8)
        return unpack_words(packed["zero"].t(), bits, shape[0]).t()

    def dequantize(
        self, packed: dict[str, torch.Tensor], shape: tuple[int, int], bits: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """Weight (d_out, d_in), as the hqq library computes it: with the scale in `dtype`."""
        codes = self._codes(packed, shape, bits).reshape(shape[0], -1, self.group_size).to(dtype)
        zero = self._zeros(packed, shape, bits).unsqueeze(-1).to(dtype)
        return codes.sub_(zero).mul_(packed["scale"].unsqueeze(-1).to(dtype)).flatten(1)

    def affine_grid(self, packed: dict[str, torch.Tensor], shape: tuple[int, int], bits: int) -> AffineGrid:
        """The codes on their grid."""
        codes, zero = self._codes(packed, shape, bits), self._zeros(packed, shape, bits).float()
        return AffineGrid(codes, packed["scale"], zero, bits, self.symmetric)

    def grid_form(self, bits: int) -> GridForm:
        """Whole zero points in groups of a row."""
        return GridForm(self.group_size, True, self.symmetric, self.metadata_dtype)

    def packed_bytes(self, shape: tuple[int, int], bits: int) -> PackedBytes:
        """Codes and zero points in words of four bytes, and two bytes of scale a group."""
        from qratk.quantizers.bitstream import words_of

        self.check(shape, bits)
        groups = shape[1] // self.group_size
        zeros = 0 if self.symmetric else 4 * words_of(shape[0], bits) * groups
        return PackedBytes(4 * shape[0] * words_of(shape[1], bits), 2 * shape[0] * groups + zeros)

    def native_layer(self, layer: PackedLayer) -> nn.Module | None:
        """An `HQQLinear` with the same codes, scales and zero points, packed as the hqq library has them.

        None where groups do not divide into the bytes of that library. At 3 bits it takes 3.2 bits a code.
        """
        from qratk.quantizers._affine import PACKING, library
        from qratk.quantizers.hqq import HQQQuantizer

        theirs = HQQQuantizer(self.group_size, self.metadata_dtype)
        try:
            theirs.check(layer.shape, layer.bits)
        except QuantizationError:
            return None
        codes = self._codes(layer.packed, layer.shape, layer.bits).reshape(-1, self.group_size)
        zero = self._zeros(layer.packed, layer.shape, layer.bits).reshape(-1, 1)
        scale = layer.packed["scale"].reshape(-1, 1)
        packed = {self.CODES: library().pack[PACKING[layer.bits]](codes), "scale": scale, "zero": zero}
        return theirs.hqq_layer(replace(layer, packed=packed))
