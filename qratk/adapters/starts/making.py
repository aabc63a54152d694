"""First values of the adapters of a model, made or mapped from a store, and found again at each switch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qratk.adapters.options import AdapterOptions
from qratk.adapters.starts.base import Start
from qratk.adapters.starts.kept import InitialPart, divided
from qratk.bank.table import Chosen, QuantizerTable, local_name
from qratk.core.errors import ConfigurationError, QuantizationError
from qratk.quantizers.none import NoQuantizer

if TYPE_CHECKING:
    from qratk.adapters.matrices.factors import Factors, Told
    from qratk.bank.linear import BankLinear, Packed
    from qratk.bank.store import BankStore, Part, Plan
    from qratk.quantizers.base import Moments


@dataclass(frozen=True)
class Inputs:
    """What calibration sequences say of the inputs of projections: a digest of all that decides it, and the moments."""

    digest: str
    moments: Callable[[str], Moments]


@dataclass(frozen=True)
class _Data:
    """What data have to say, where the start asks."""

    weightings: Mapping[str, Told]
    inputs: Inputs | None


class FirstValues:
    """What the adapters of a model begin with at bits and ranks, where they do not begin without effect.

    With one iteration the values are made for the largest of the ranks, and serve every smaller one; with more, each
    rank has its own, and its own packed weights: as many banks as there are ranks.

    Args:
        layers: names and projections of the layers, in model order.
        options: which start, in how many iterations.
        table: what packs the projections.
    """

    def __init__(
        self,
        layers: Sequence[tuple[str, Sequence[tuple[str, BankLinear]]]],
        options: AdapterOptions,
        table: QuantizerTable,
    ) -> None:
        self._layers, self._options, self._table = layers, options, table
        self._banks = {name: bank for _, modules in layers for name, bank in modules}
        self._factors: dict[tuple[str, int, int | None], Factors] = {}  # by projection, bits and, if it counts, rank
        self._made: set[tuple[int, int]] = set()  # bits and ranks that `build` was asked for

    def needs(self, choices: Iterable[tuple[int, int]]) -> bool:
        """Whether `build` would have something to do for these bits and ranks."""
        return self._options.start is not None and any(c not in self._made for c in choices if c[1])

    def build(
        self,
        choices: Iterable[tuple[int, int]],
        weightings: Mapping[str, Told] | None,
        store: Callable[[], BankStore | None],
        inputs: Inputs | None = None,
    ) -> None:
        """Make the values for these (bits, rank), or map what the store has.

        A weighted start needs the weightings, a calibrated one the inputs. Raises `ConfigurationError` without these,
        `QuantizationError` when the full-precision weights are gone.
        """
        wanted = sorted({choice for choice in choices if choice[1] and choice not in self._made})
        start = self._options.start
        if not wanted or start is None:
            return
        self._require(start, weightings, inputs, wanted)
        data = _Data((weightings or {}) if start.weighted else {}, inputs if start.calibrated else None)
        files = store()
        for bits, rank in self._runs(wanted):
            self._build(bits, rank, data, files)
        self._made.update(wanted)

    def _require(
        self,
        start: Start,
        weightings: Mapping[str, Told] | None,
        inputs: Inputs | None,
        wanted: Sequence[tuple[int, int]],
    ) -> None:
        if start.weighted and weightings is None:
            raise ConfigurationError(
                f"{self._options.init!r} needs the Fisher weights of calibration batches, and none were given"
            )
        if start.calibrated and inputs is None:
            raise ConfigurationError(
                f"{self._options.init!r} is fitted to the inputs of projections, and no calibration batches were given"
            )
        if not all(bank.has_reference for bank in self._banks.values()):
            raise QuantizationError(
                f"the first values of adapters at (bits, rank) {wanted[0]} were not made before the full-precision "
                "weights were released; load the model again"
            )

    def _runs(self, wanted: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        from qratk.adapters.matrices.factors import BLOCK

        if self._options.init_iterations > 1:
            return list(wanted)
        held = {bits: factors.rank for (_, bits, _), factors in self._factors.items()}
        largest = dict(wanted)  # sorted: the last of each bit-width
        return [(b, -(-r // BLOCK) * BLOCK) for b, r in largest.items() if r > held.get(b, 0)]

    def _build(self, bits: int, rank: int, data: _Data, store: BankStore | None) -> None:
        from qratk.bank.store import Plan

        layers = tuple(
            (name, tuple(self._part(name, n, bits, rank, data) for n, b in modules if self._begins(b, bits)))
            for name, modules in self._layers
        )
        plan = Plan(bits, layers, next(iter(self._banks.values())).device.type)
        for index, (_, parts) in enumerate(layers):
            made = self._tensors(plan, index, data, store) if parts else {}
            for each in parts:
                self._take(each, bits, rank, made[each.name])

    def _part(self, layer: str, name: str, bits: int, rank: int, data: _Data) -> Part:
        from qratk.bank.digests import checksum
        from qratk.bank.store import Part

        bank = self._banks[name]
        own: Chosen = self._table.choose(layer, local_name(layer, name), bank.shape, bits)
        digest = data.weightings[name].digest if name in data.weightings else ""
        fitted = own.quantizer.calibrated
        packed = checksum({k: t.cpu() for k, t in bank.require(bits).packed.items()}) if fitted else ""
        chosen: Any = InitialPart(own, self._options, rank, digest, packed, data.inputs.digest if data.inputs else "")
        chosen.check()
        return Part(name, bank.shape, chosen)

    def _tensors(self, plan: Plan, index: int, data: _Data, store: BankStore | None) -> dict[str, Packed]:
        def build() -> dict[str, Packed]:
            import torch

            parts: list[Any] = [(part.name, part.chosen) for part in plan.layers[index][1]]
            made: dict[str, Packed] = {}
            for name, chosen in parts:
                moments = data.inputs.moments(name) if data.inputs else None
                with torch.no_grad():
                    made[name] = chosen.build(self._banks[name], plan.bits, data.weightings.get(name), moments)
            return made

        return build() if store is None else store.fetch(plan, index, build)

    def _take(self, part: Part, bits: int, rank: int, tensors: Mapping[str, Any]) -> None:
        from qratk.bank.linear import PackedVariant

        packed, factors = divided(dict(tensors))
        bank = self._banks[part.name]
        self._factors[part.name, bits, rank if packed else None] = factors
        if packed:
            placed = {key: tensor.to(bank.device) for key, tensor in packed.items()}
            bank.add_variant(bits, PackedVariant(part.chosen.quantizer, part.chosen.bits, placed), rank=rank)

    def factors(self, name: str, bits: int, rank: int) -> Factors | None:
        """First values of a projection's adapter, before scaling; None where it begins without effect.

        Raises `QuantizationError` where `build` was not asked for them.
        """
        if not rank or self._options.start is None or not self._begins(self._banks[name], bits):
            return None
        factors = self._factors.get((name, bits, rank)) or self._factors.get((name, bits, None))
        if factors is None:
            raise QuantizationError(
                f"the first values of adapters at {bits} bits and rank {rank} are not made; call "
                f"`backbone.build_initial([({bits}, {rank})])` after `build_bank` and before the reference is released"
            )
        return factors

    def _begins(self, bank: BankLinear, bits: int) -> bool:
        """Whether the start has values for a projection: at 16 bits there is no error to make up for."""
        start = self._options.start
        assert start is not None  # else there is nothing to begin with
        return not start.approximates or not isinstance(bank.require(bits).quantizer, NoQuantizer)
