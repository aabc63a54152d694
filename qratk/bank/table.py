"""Which quantizer packs which projection at which bit-width, and what happens when it cannot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass

from qratk.core.errors import ConfigurationError, QuantizationError
from qratk.core.memory import LayerShape
from qratk.quantizers.base import PackedBytes, Quantizer
from qratk.quantizers.none import NoQuantizer


@dataclass(frozen=True)
class Fallback:
    """A projection that its quantizer could not take: what was wanted, what is used instead, and why."""

    layer: str
    projection: str
    bits: int
    wanted: str
    used: str
    reason: str

    def __str__(self) -> str:
        return (
            f"{self.layer}.{self.projection} at {self.bits} bits: {self.used} instead of {self.wanted} ({self.reason})"
        )


def told(fallbacks: Iterable[Fallback]) -> tuple[str, ...]:
    """A line for each kind of fallback: its first projection, and how many more there are."""
    groups: dict[tuple[int, str, str], list[Fallback]] = {}
    for fallback in fallbacks:
        groups.setdefault((fallback.bits, fallback.wanted, fallback.used), []).append(fallback)
    return tuple(f"{first}{f' (and {len(more)} more projections)' if more else ''}" for first, *more in groups.values())


def local_name(layer: str, name: str) -> str:
    """A projection's name within its layer; layers that are no module (feed_forward) keep the last part."""
    return name.removeprefix(f"{layer}.") if name.startswith(f"{layer}.") else name.rpartition(".")[2]


@dataclass(frozen=True)
class Chosen:
    """A quantizer and the bit-width that it packs at."""

    quantizer: Quantizer
    bits: int

    def __str__(self) -> str:
        return f"{describe(self.quantizer)} at {self.bits} bits"

    def packed_bytes(self, shape: tuple[int, int]) -> PackedBytes:
        """Exact bytes of a weight (d_out, d_in)."""
        return self.quantizer.packed_bytes(shape, self.bits)


def options(component: object) -> dict[str, object]:
    """Constructor options of a quantizer (or so) as plain data; of one that is no dataclass, its public attributes."""
    if is_dataclass(component):
        return {field.name: getattr(component, field.name) for field in fields(component) if field.init}
    return {name: value for name, value in vars(component).items() if not name.startswith("_")}


def describe(quantizer: Quantizer) -> str:
    """Name and options of a quantizer, as in 'hqq(group_size=64)': equal text means equal results."""
    name = quantizer.component_name or f"{type(quantizer).__module__}.{type(quantizer).__qualname__}"
    return f"{name}({', '.join(f'{key}={value}' for key, value in sorted(options(quantizer).items()))})"


class QuantizerTable:
    """The quantizer of each bit-width; 16 bits are always there.

    A projection that a quantizer cannot take gets its alternatives (smaller groups), then the next higher bit-width
    of the table. Each such case is recorded in `fallbacks`, and its exact bytes are counted.
    """

    def __init__(self, quantizers: Mapping[int, Quantizer]) -> None:
        table = {int(bits): quantizer for bits, quantizer in quantizers.items()}
        table.setdefault(16, NoQuantizer())
        for bits, quantizer in table.items():
            if bits not in quantizer.supported_bits:
                raise ConfigurationError(
                    f"quantizer {describe(quantizer)} does {quantizer.supported_bits} bits, not {bits}; "
                    f"name another one for {bits} bits"
                )
        self._table = dict(sorted(table.items()))
        self._fallbacks: dict[tuple[str, str, int], Fallback] = {}

    @property
    def quantizers(self) -> Mapping[int, Quantizer]:
        """The table, by ascending bits."""
        return self._table

    @property
    def calibrated(self) -> bool:
        """Whether some quantizer of the table is fitted to the inputs of projections."""
        return any(quantizer.calibrated for quantizer in self._table.values())

    @property
    def fallbacks(self) -> tuple[Fallback, ...]:
        """Every fallback met so far, in the order they were met."""
        return tuple(self._fallbacks.values())

    def choose(self, layer: str, projection: str, shape: tuple[int, int], bits: int) -> Chosen:
        """What packs a projection of a layer, (d_out, d_in), at a bit-width.

        Raises `ConfigurationError` when the table has no such bit-width.
        """
        if bits not in self._table:
            raise ConfigurationError(
                f"no quantizer for {bits} bits: there are some for {tuple(self._table)}; add one under 'quantizers'"
            )
        wanted, reason = Chosen(self._table[bits], bits), ""
        for chosen in self._chain(bits):
            try:
                chosen.quantizer.check(shape, chosen.bits)
            except QuantizationError as error:
                reason = reason or str(error)
                continue
            if reason:
                fallback = Fallback(layer, projection, bits, str(wanted), str(chosen), reason)
                self._fallbacks.setdefault((layer, projection, bits), fallback)
            return chosen
        raise QuantizationError(f"{layer}.{projection}: nothing takes it at {bits} bits or more: {reason}")

    def _chain(self, bits: int) -> Iterator[Chosen]:
        for other, quantizer in self._table.items():
            if other >= bits:
                yield Chosen(quantizer, other)
                for alternative in quantizer.alternatives():
                    yield Chosen(alternative, other)

    def layer_bytes(self, shape: LayerShape, bits: int) -> PackedBytes:
        """Exact bytes of all projections of a layer at a bit-width."""
        parts = [
            self.choose(shape.name, name, (d_out, d_in), bits).packed_bytes((d_out, d_in))
            for name, d_in, d_out in shape.projections
        ]
        return PackedBytes(sum(part.weights for part in parts), sum(part.metadata for part in parts))

    def shared_bytes(self, shapes: tuple[LayerShape, ...], bits: tuple[int, ...]) -> int:
        """Bytes of code tables that the quantizers in use hold once in all, whatever the number of layers."""
        chosen = (
            self.choose(shape.name, name, (d_out, d_in), b).quantizer
            for shape in shapes
            for name, d_in, d_out in shape.projections
            for b in bits
        )
        # By text: a third party's quantizer need not be hashable.
        used = {describe(quantizer): quantizer for quantizer in chosen}
        return sum(quantizer.shared_bytes for quantizer in used.values())
