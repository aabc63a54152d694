"""The contract of starts: first values of adapters, such as approximate what quantisation took away."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from qratk.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor, nn

    from qratk.adapters.matrices.factors import Directions, Factors, Weighting
    from qratk.bank.linear import BankLinear, Packed
    from qratk.bank.table import Chosen
    from qratk.quantizers.base import Moments


@dataclass(frozen=True, eq=False)
class Residual:
    """A projection with its quantisation error, which an adapter may make up for.

    Attributes:
        weight: at full precision, (d_out, d_in).
        packed: the weight as the bank has it.
        chosen: what packed it, and packs it anew.
        group: inputs that the adapter sums into one.
        weighting: what errors cost, or the directions of the inputs, for starts that ask.
        moments: of the projection's inputs, on the weight's device, for starts that ask for them.
    """

    weight: Tensor
    packed: Packed
    chosen: Chosen
    group: int = 1
    weighting: Weighting | Directions | None = None
    moments: Moments | None = None


class Start(ABC):
    """First values of adapters, made from full-precision weights when the bank is built."""

    approximates: ClassVar[bool] = True
    """Whether the values make up for the quantisation error, of which 16 bits have none; else B is zero at first."""

    @property
    @abstractmethod
    def weighted(self) -> bool:
        """Whether calibration batches have a say, in what errors cost, say: `weightings` is asked for then."""

    @property
    def calibrated(self) -> bool:
        """Whether `Residual.moments` are asked for: those of calibration tokens, as GPTQ's."""
        return False

    @abstractmethod
    def weightings(
        self, model: nn.Module, projections: Mapping[str, BankLinear], batches: Sequence[dict[str, Any]]
    ) -> Mapping[str, Weighting | Directions]:
        """What they say of every projection, from a model at full precision and without adapters; else empty."""

    @abstractmethod
    def begin(self, residual: Residual, rank: int, iterations: int) -> tuple[Packed, Factors]:
        """Packed weight and factors up to a rank, after so many rounds of quantising and approximating in turn.

        The packed weight is the bank's own after one round.
        """


starts: Registry[Start] = Registry("adapters.starts", "Start")
