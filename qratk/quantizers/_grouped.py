"""What quantizers with a grid for each group of weights have in common."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from qratk.core.errors import QuantizationError
from qratk.quantizers.base import Quantizer


@dataclass(frozen=True)
class GroupedQuantizer(Quantizer):
    """Codes of 2, 3, 4 or 8 bits; `group_size` weights share a grid."""

    group_size: int = 64

    adds_bias_afterwards: ClassVar[bool] = True
    smaller_groups: ClassVar[tuple[int, ...]] = (64, 32, 16, 8)

    @property
    def supported_bits(self) -> tuple[int, ...]:
        """2, 3, 4 and 8. (1 bit is unusable.)"""
        return (2, 3, 4, 8)

    def alternatives(self) -> tuple[Self, ...]:
        """The same with smaller groups, largest first: what to try for a shape that this one cannot take."""
        return tuple(replace(self, group_size=size) for size in self.smaller_groups if size < self.group_size)

    def check(self, shape: tuple[int, int], bits: int) -> None:
        """Raise `QuantizationError` for bits that there are not; subclasses look at the shape."""
        if bits not in self.supported_bits:
            raise QuantizationError(f"{self._name} does {self.supported_bits} bits, got {bits}")

    @property
    def _name(self) -> str:
        return repr(self.component_name or type(self).__name__)
