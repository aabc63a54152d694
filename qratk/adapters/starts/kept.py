"""What a store of packed weights keeps of a projection that has a start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qratk.adapters.options import AdapterOptions
from qratk.adapters.starts.base import Residual
from qratk.bank.table import Chosen
from qratk.core.errors import ConfigurationError
from qratk.quantizers.base import PackedBytes, Quantizer

if TYPE_CHECKING:
    from qratk.adapters.matrices.factors import Factors, Told
    from qratk.bank.linear import BankLinear, Packed
    from qratk.quantizers.base import Moments

_A, _B = "initial_a", "initial_b"


@dataclass(frozen=True)
class InitialPart:
    """In the place of a `Chosen`: the factors of a projection and, where that is quantised anew, its packed weight.

    `weighting` is the digest of its weighting, `packed` that of a packed weight that calibration decides too, `inputs`
    that of what decides the moments of its inputs.
    """

    chosen: Chosen
    options: AdapterOptions
    rank: int
    weighting: str = ""
    packed: str = ""
    inputs: str = ""

    @property
    def quantizer(self) -> Quantizer:
        """What packs the weight."""
        return self.chosen.quantizer

    @property
    def bits(self) -> int:
        """What it packs at."""
        return self.chosen.bits

    def check(self) -> None:
        """Raise `ConfigurationError` where the weight would have to be packed anew by what calibration fits."""
        if self.repacked and getattr(self.quantizer, "calibrated", False):
            raise ConfigurationError(
                f"init_iterations={self.options.init_iterations} would pack weights anew without calibration, which "
                f"{type(self.quantizer).__name__} needs; give init_iterations=1 or another quantizer"
            )

    @property
    def repacked(self) -> bool:
        """Whether the weight is quantised anew for this rank."""
        return self.options.init_iterations > 1

    def __str__(self) -> str:
        options = self.options
        times, group = options.init_iterations, options.input_group
        about = f"initial 1: {options.init}, rank {self.rank}, iterations {times}, groups of {group}"
        fitted = f"{', of ' * bool(self.packed)}{self.packed}{', inputs ' * bool(self.inputs)}{self.inputs}"
        return f"{self.chosen}; {about}, weights {self.weighting or 'equal'}{fitted}"

    def packed_bytes(self, shape: tuple[int, int]) -> PackedBytes:
        """Bytes of the factors, as metadata, and of the packed weight."""
        factors = 4 * self.rank * (shape[0] + shape[1] // self.options.input_group)
        own = self.chosen.packed_bytes(shape) if self.repacked else PackedBytes(0, 0)
        return PackedBytes(own.weights, own.metadata + factors)

    def build(self, bank: BankLinear, bits: int, weighting: Told | None, moments: Moments | None) -> Packed:
        """The tensors that are kept, from the bank's reference and its packed weight."""
        start = self.options.start
        assert start is not None  # else there is nothing to keep
        held = bank.require(bits).packed
        residual = Residual(bank.reference, held, self.chosen, self.options.input_group, weighting, moments)
        packed, factors = start.begin(residual, self.rank, self.options.init_iterations)
        return {**(packed if self.repacked else {}), _A: factors.a, _B: factors.b}


def divided(tensors: Packed) -> tuple[Packed, Factors]:
    """The packed weight, empty where that is the bank's own, and the factors."""
    from qratk.adapters.matrices.factors import Factors

    packed = {key: value for key, value in tensors.items() if key not in (_A, _B)}
    return packed, Factors(tensors[_A], tensors[_B])
