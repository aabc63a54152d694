"""The contract of quantizers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from qratk.registry import Registry

if TYPE_CHECKING:
    import torch


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
    """

    second: torch.Tensor
    magnitude: torch.Tensor
    tokens: int


class Quantizer(ABC):
    """Packs a weight matrix (d_out, d_in) at a bit-width into named tensors, and back.

    The packed form is a plain dict of tensors: it is written to safetensors and moved between devices as it is. Which
    of its tensors are codes is told by `CODES`; all others are metadata. `packed_bytes` equals the tensors' bytes.

    A quantizer that fits the codes to the projection's inputs sets `calibrated` and overrides `quantize_calibrated`:
    the backbone then packs by that alone, and only after `Backbone.calibrate`. What `quantize` packs, without moments,
    has the same tensors, shapes and bytes.
    """

    CODES = "codes"
    calibrated: ClassVar[bool] = False

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
