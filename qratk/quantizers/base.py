"""The contract of quantizers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from qratk.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class PackedBytes:
    """Bytes of a packed weight: the codes (with padding), and scales, zero points and nested statistics."""

    weights: int
    metadata: int

    @property
    def total(self) -> int:
        """All bytes."""
        return self.weights + self.metadata


@dataclass(frozen=True, eq=False)
class Moments:
    """What calibration tokens say of the inputs x of a projection; zeros when none reached it.

    Attributes:
        second: E[x x^T], (d_in, d_in) float32.
        magnitude: E|x|, (d_in,) float32.
        tokens: how many tokens the means are over.
        mean: E[x], (d_in,) float32, where it was gathered.
    """

    second: torch.Tensor
    magnitude: torch.Tensor
    tokens: int
    mean: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class AffineGrid:
    """Codes of a weight with a scale and a zero point for each group of a row: W = (codes - zero) * scale.

    Attributes:
        codes: (d_out, d_in) uint8, below 2^bits.
        scale: (d_out, groups), in the type that it is stored in; a group is d_in / groups neighbours of a row.
        zero: (d_out, groups) float32.
        bits: of a code.
        symmetric: whether every zero point is 2^(bits - 1) by construction.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    bits: int
    symmetric: bool = False

    @property
    def group_size(self) -> int:
        """Weights of a group."""
        return self.codes.shape[1] // self.scale.shape[1]

    @property
    def whole(self) -> bool:
        """Whether every zero point is a whole number that a code can be."""
        return bool(((self.zero == self.zero.round()) & (self.zero >= 0) & (self.zero < 2**self.bits)).all())


@dataclass(frozen=True)
class GridForm:
    """How a quantizer lays out its grids at a bit-width: what is known of an `AffineGrid` before there is a weight.

    Attributes:
        group_size: weights of a row that share a scale and a zero point; None for the whole row.
        whole: whether zero points are whole numbers that a code can be.
        symmetric: whether every zero point is 2^(bits - 1) by construction.
        scale_dtype: type of scales as stored: "float16", "bfloat16" or "float32".
    """

    group_size: int | None
    whole: bool
    symmetric: bool
    scale_dtype: str


@dataclass(frozen=True, eq=False)
class PackedLayer:
    """A packed projection that is to become a layer of the library whose storage layout it has.

    Attributes:
        packed: the tensors, to be copied: the bank goes on holding its own.
        shape: (d_out, d_in).
        bits: bit-width that they are packed at.
        bias: (d_out,) or None, as stored.
        dtype: compute type of the model.
        multiply: x W^T plus a bias, (..., d_out), of x (..., d_in), of what makes the dense W, and of the bias: the
            product that adapters were trained and scored with.
        library_product: let the layer multiply in the library's own way instead, where it has a faster one.
    """

    packed: dict[str, torch.Tensor]
    shape: tuple[int, int]
    bits: int
    bias: torch.Tensor | None
    dtype: torch.dtype
    multiply: Callable[[torch.Tensor, Callable[[], torch.Tensor], torch.Tensor | None], torch.Tensor]
    library_product: bool = False

    def parameters(self) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """Copies of the bias, in the compute type, and of the packed tensors."""
        bias = None if self.bias is None else self.bias.to(self.dtype, copy=True)
        return bias, {name: tensor.clone() for name, tensor in self.packed.items()}


class Quantizer(ABC):
    """Packs a weight matrix (d_out, d_in) at a bit-width into named tensors, and back.

    The packed form is a plain dict of tensors: it is written to safetensors and moved between devices as it is. Which
    of its tensors are codes is told by `CODES`; all others are metadata. `packed_bytes` equals the tensors' bytes.

    A quantizer that fits the codes to the projection's inputs sets `calibrated` and overrides `quantize_calibrated`:
    the backbone then packs by that alone, and only after `Backbone.calibrate`. What `quantize` packs, without moments,
    has the same tensors, shapes and bytes.

    What else there is to say of a quantizer is said here, with what holds for most: `adds_bias_afterwards`,
    `alternatives`, `shared_bytes`, `affine_grid`, `grid_form` and `native_layer`.
    """

    CODES = "codes"
    component_name: ClassVar[str | None] = None
    """The name that it is registered under; None for a class that is not."""
    calibrated: ClassVar[bool] = False
    """Whether codes are fitted to the projection's inputs."""
    adds_bias_afterwards: ClassVar[bool] = False
    """Whether the library's layer adds the bias to the finished product: a fused addition differs in the last bit."""

    @property
    def shared_bytes(self) -> int:
        """Bytes of code tables that are held once, whatever the number of layers."""
        return 0

    def alternatives(self) -> Sequence[Quantizer]:
        """What to try for a shape that this one cannot take, the nearest first."""
        return ()

    def affine_grid(self, packed: dict[str, torch.Tensor], shape: tuple[int, int], bits: int) -> AffineGrid | None:
        """The codes on their grid, for forms of other tools; None where there is none, or groups span rows.

        In float32 it stands for what `dequantize` makes.
        """
        return None

    def grid_form(self, bits: int) -> GridForm | None:
        """How the grids of `affine_grid` are laid out at a bit-width; None where there are none.

        A search that is to be served is refused by it before weights are loaded.
        """
        return None

    def native_layer(self, layer: PackedLayer) -> nn.Module | None:
        """A layer of the library whose layout this is, with copies of the codes; None where there is none.

        It must be one that PEFT wraps, and multiply by what `dequantize` makes.
        """
        return None

    @property
    @abstractmethod
    def supported_bits(self) -> tuple[int, ...]:
        """Bit-widths that it can do."""

    @abstractmethod
    def check(self, shape: tuple[int, int], bits: int) -> None:
        """Raise `QuantizationError`, saying why, when a weight of this shape (d_out, d_in) cannot be taken."""

    @abstractmethod
    def quantize(self, weight: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
        """Packed tensors of a weight (d_out, d_in); raises `QuantizationError`."""

    def quantize_calibrated(self, weight: torch.Tensor, bits: int, moments: Moments) -> dict[str, torch.Tensor]:
        """As `quantize`, with moments of the inputs on the weight's device; here they are left out of account."""
        return self.quantize(weight, bits)

    @abstractmethod
    def dequantize(
        self, packed: dict[str, torch.Tensor], shape: tuple[int, int], bits: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """Weight (d_out, d_in) that the packed tensors stand for."""

    @abstractmethod
    def packed_bytes(self, shape: tuple[int, int], bits: int) -> PackedBytes:
        """Exact bytes of `quantize` on a weight of this shape, without computing it."""


quantizers: Registry[Quantizer] = Registry("quantizers", "Quantizer")
