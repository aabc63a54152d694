"""The bank of a model, built: every projection packed at every bit-width asked for, or mapped from a store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager

import torch

from qratk.bank.calibration import Calibration
from qratk.bank.digests import sha256_of
from qratk.bank.linear import BankLinear, Packed, PackedVariant, ReferenceVariant
from qratk.bank.store import BankStore, Part, Plan, return_freed_memory
from qratk.bank.table import Chosen, QuantizerTable, local_name
from qratk.core.errors import QuantizationError
from qratk.core.work import counted
from qratk.quantizers.base import Moments
from qratk.quantizers.none import NoQuantizer

Layers = Sequence[tuple[str, Sequence[tuple[str, BankLinear]]]]
"""Names of layers in model order, each with its projections by qualified name."""

_LARGE = 1 << 20  # bytes of a weight that is worth a word with the allocator


class Packer:
    """Packs the projections of a model.

    Args:
        layers: what is packed.
        table: by what.
        bare: context in which the model's adapters add nothing, for passes that calibrate.

    Attributes:
        built: bit-widths that were asked for.
        calibration: the sequences that quantisers such as GPTQ are fitted to.
    """

    def __init__(
        self, layers: Layers, table: QuantizerTable, *, bare: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._layers, self._table, self._bare = layers, table, bare
        self._banks = {name: bank for _, modules in layers for name, bank in modules}
        self.built: set[int] = set()
        self.calibration: Calibration | None = None

    def hold_reference(self) -> None:
        """Have 16 bits work through the full-precision weights, for estimators and references, without a copy."""
        for layer, modules in self._layers:
            for name, bank in modules:
                chosen = self._chosen(layer, name, 16)
                bank.add_variant(16, ReferenceVariant(chosen.quantizer, chosen.bits, bank.reference))

    def release_reference(self) -> None:
        """Drop the full-precision weights, and 16 bits too unless they were built."""
        for bank in self._banks.values():
            bank.release_reference()
            if 16 not in self.built:
                bank.drop_variant(16)

    def keep_active(self) -> None:
        """Drop all packed weights but those in use."""
        for bank in self._banks.values():
            bank.keep_active()
        self.built.clear()

    def calibrate(self, calibration: Calibration) -> bool:
        """Take sequences; whether they are others than before. Raises `QuantizationError` when the bank has those."""
        if self.calibration is not None and self.calibration.digest == calibration.digest:
            return False
        if any(self._table.quantizers[bits].calibrated for bits in self.built):
            raise QuantizationError("the bank was built with other calibration sequences; load the model again")
        self.calibration = calibration
        return True

    def missing(self, bits: Iterable[int]) -> list[int]:
        """Those of the bit-widths that some projection is not packed at."""
        wanted = (b for b in dict.fromkeys(bits) if b not in self.built)
        return [b for b in wanted if any(not bank.holds(b) for bank in self._banks.values())]

    def build(
        self, bits: Iterable[int], store: Callable[[], BankStore | None], model: Callable[[], Iterable[str]]
    ) -> None:
        """Pack at each bit-width that is not there yet, or map what the store has of it, layer by layer.

        Besides the bank, one packed layer and the quantizer's workspace for one projection are in memory, and with a
        store the bank itself is mapped from its files. `model` says in lines of text all that decides the inputs of
        projections.
        """
        wanted = list(bits)
        plans = [self._plan(b, model) for b in self.missing(wanted)]
        files = store() if any(parts for plan in plans for _, parts in plan.layers) else None
        for index in counted("packing weights", range(len(self._layers) if plans else 0)):
            for plan in plans:
                self._build_layer(index, plan, files)
        if plans and self.calibration is not None:
            self.calibration.release()
        self.built.update(wanted)

    def _plan(self, bits: int, model: Callable[[], Iterable[str]]) -> Plan:
        # Chosen for every layer before the first is packed: what cannot be taken is known at once.
        layers = tuple((layer, self._parts(layer, modules, bits)) for layer, modules in self._layers)
        calibration = self._calibration_digest([part.chosen for _, parts in layers for part in parts], model)
        return Plan(bits, layers, next(iter(self._banks.values())).device.type, calibration)

    def _parts(self, layer: str, modules: Sequence[tuple[str, BankLinear]], bits: int) -> tuple[Part, ...]:
        # What must be packed; a weight of 16 bits, in memory or mapped from the checkpoint, is its own packed form.
        parts = (Part(name, bank.shape, self._chosen(layer, name, bits)) for name, bank in modules)
        return tuple(part for part in parts if not _is_reference(part.chosen, self._banks[part.name]))

    def _chosen(self, layer: str, name: str, bits: int) -> Chosen:
        return self._table.choose(layer, local_name(layer, name), self._banks[name].shape, bits)

    def _calibration_digest(self, chosen: Sequence[Chosen], model: Callable[[], Iterable[str]]) -> str:
        wanting = next((each for each in chosen if each.quantizer.calibrated), None)
        if wanting is None:
            return ""
        if self.calibration is None:
            raise QuantizationError(
                f"{wanting} is fitted to the inputs of projections: call `backbone.calibrate(batches)` before the bank "
                "is built, or take a quantizer that needs no data, such as 'hqq'"
            )
        return sha256_of([self.calibration.digest, *model()])

    def _build_layer(self, index: int, plan: Plan, store: BankStore | None) -> None:
        (layer, modules), parts = self._layers[index], plan.layers[index][1]
        if all(bank.holds(plan.bits) for _, bank in modules):
            return
        to_pack = {part.name: part.chosen for part in parts}

        def build() -> dict[str, Packed]:
            return {name: self.packed(name, chosen) for name, chosen in to_pack.items()}

        packed = store.fetch(plan, index, build) if store is not None and parts else build()
        for name, bank in modules:
            chosen = to_pack.get(name) or self._chosen(layer, name, plan.bits)
            tensors = packed[name] if name in packed else self.packed(name, chosen)
            placed = {key: tensor.to(bank.device) for key, tensor in tensors.items()}
            bank.add_variant(plan.bits, PackedVariant(chosen.quantizer, chosen.bits, placed))

    def packed(self, name: str, chosen: Chosen) -> Packed:
        """The packed weight of a projection, from its reference."""
        reference = self._banks[name].reference
        weight = reference.contiguous()
        with torch.no_grad():
            if chosen.quantizer.calibrated:
                packed = chosen.quantizer.quantize_calibrated(weight, chosen.bits, self._moments(name))
            else:
                packed = chosen.quantizer.quantize(weight, chosen.bits)
        if reference.nbytes > _LARGE:
            return_freed_memory()
        return packed

    def _moments(self, name: str) -> Moments:
        assert self.calibration is not None  # `_plan` has looked
        return self.moments(self.calibration, name)

    def moments(self, calibration: Calibration, name: str) -> Moments:
        """Moments of a projection's inputs in the full-precision model, without adapters."""
        active = {bank: (bank.active, bank.active_rank) for bank in self._banks.values()}
        for bank in active:
            bank.activate(16)
        try:
            with self._bare():
                return calibration.moments(name)
        finally:
            for bank, (bits, rank) in active.items():
                bank.activate(bits, rank)


def _is_reference(chosen: Chosen, bank: BankLinear) -> bool:
    if not isinstance(chosen.quantizer, NoQuantizer) or not bank.has_reference:
        return False
    empty = bank.reference[:0]
    packed = chosen.quantizer.quantize(empty, chosen.bits)[NoQuantizer.CODES]
    return packed.dtype == empty.dtype and bank.reference.is_contiguous()
