"""The contract of quantizers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

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


class Quantizer(ABC):
    """Packs a weight matrix (d_out, d_in) at a bit-width into named tensors, and back.

    The packed form is a plain dict of tensors: it is written to safetensors and moved between devices as it is. Which
    of its tensors are codes is told by `CODES`; all others are metadata. `packed_bytes` equals the tensors' bytes.
    """

    CODES = "codes"

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

    @abstractmethod
    def dequantize(
        self, packed: dict[str, torch.Tensor], shape: tuple[int, int], bits: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """Weight (d_out, d_in) that the packed tensors stand for."""

    @abstractmethod
    def packed_bytes(self, shape: tuple[int, int], bits: int) -> PackedBytes:
        """Exact bytes of `quantize` on a weight of this shape, without computing it."""


quantizers: Registry[Quantizer] = Registry("quantizers", "Quantizer")
