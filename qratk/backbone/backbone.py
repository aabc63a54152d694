"""The backbone: a causal language model whose projections live in the bank, and whose adapters change rank in place."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qratk.adapters.base import AdapterMethod, Adapters, stored_bytes
from qratk.adapters.lora import Lora
from qratk.adapters.matrices.factors import BLOCK, Factors, Weighting
from qratk.adapters.options import AdapterOptions
from qratk.adapters.starts.kept import InitialPart, divided
from qratk.backbone.layers import (
    Coverage,
    Granularity,
    LayerNames,
    TargetLayer,
    coverage,
    find_layers,
    is_conv1d,
)
from qratk.backbone.loading import check_finite, check_tokens, load_model, load_tokenizer, resolve_dtype
from qratk.backbone.logits import without_adapters
from qratk.bank.calibration import Calibration
from qratk.bank.dense import DenseCache, dense_cache_mode
from qratk.bank.linear import BankLinear, ReferenceVariant, Variant
from qratk.bank.store import BankStore, Part, Plan, bank_directory, checksum, log, return_freed_memory
from qratk.bank.table import Chosen, Fallback, QuantizerTable, describe, told
from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError, QuantizationError
from qratk.core.memory import LayerShape
from qratk.quantizers.base import Moments, Quantizer
from qratk.quantizers.none import NoQuantizer

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = ["AdapterOptions", "Backbone", "Fallback", "TargetLayer"]


_LARGE = 1 << 20  # bytes of a weight that is worth a word with the allocator


class Backbone:
    """A model to be fine-tuned at any configuration: the bank of packed weights and the adapters.

    Made by `load` or `from_model`. It begins with every layer at 16 bits and rank 0, which works through the
    full-precision reference until `release_reference`. Then: `build_bank` once, `activate` for each candidate.
    The embeddings, head and norms keep the compute dtype; they are frozen too.

    Attributes:
        model: the PEFT model, an ordinary `nn.Module`: `model(input_ids=..., attention_mask=...).logits`.
        tokenizer: the model's tokenizer, or None.
        layers: the searched layers, in model order.
        adapters: the adapters; most of what they do is offered here too.
        bank_dir: folder of packed weights on disk, or None; see `BankStore`.
        say: is told what happens to the files of the bank; by default a logger.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any = None,
        *,
        quantizers: Mapping[int, Quantizer],
        granularity: Granularity = "block",
        target_modules: str | Sequence[str] = "all",
        adapter: AdapterOptions | None = None,
        method: AdapterMethod | None = None,
        compute_dtype: str | torch.dtype = "auto",
        bank_dir: str | Path | None = "auto",
    ) -> None:
        check_tokens(model, tokenizer)
        self.tokenizer = tokenizer
        self.table = QuantizerTable(quantizers)
        self.granularity: Granularity = granularity
        self.target_modules = target_modules
        self.compute_dtype = resolve_dtype(compute_dtype)
        self.configuration: Configuration | None = None
        self._built: set[int] = set()
        self._calibration: Calibration | None = None
        self._factors: dict[tuple[str, int, int | None], Factors] = {}  # by projection, bits and, if it counts, rank
        self._initial: set[tuple[int, int]] = set()  # bits and ranks that `build_initial` was asked for
        self._digest: str | None = None
        self._digests: dict[str, str] | None = None
        self.bank_dir = bank_directory(bank_dir)
        self.say: Callable[[str], None] = log
        names = find_layers(model, granularity=granularity, target_modules=target_modules)
        _cast(model, self.compute_dtype, keep={name for layer in names for name in layer.projections})
        self.layers = tuple(_bank_layer(model, layer) for layer in names)
        self._banks = {name: bank for layer in self.layers for name, bank in layer.modules}
        self._fixed_names = _distinct(model)
        self.coverage: Coverage = coverage(model)
        self.dense_cache("off")
        self.adapters: Adapters = (method or Lora()).wrap(model, self._banks, adapter or AdapterOptions())
        self.model: PeftModel = self.adapters.peft_model
        self._start()

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        quantizers: Mapping[int, Quantizer],
        granularity: Granularity = "block",
        target_modules: str | Sequence[str] = "all",
        adapter: AdapterOptions | None = None,
        method: AdapterMethod | None = None,
        compute_dtype: str | torch.dtype = "auto",
        trust_remote_code: bool = False,
        tokenizer: str | None = None,
        weights: bool = True,
        bank_dir: str | Path | None = "auto",
    ) -> Backbone:
        """Backbone of a Hugging Face name or local directory.

        Without `weights` it is built on the meta device from the configuration alone: enough for a memory model, and
        the tokenizer may then be missing. Packed weights are kept in `bank_dir` and mapped from there by later runs:
        "auto" is $QRATK_CACHE or else qratk/banks in the user's cache folder, None keeps them in memory.

        Raises `UnsupportedModelError`, saying what could not be loaded.
        """
        return cls(
            load_model(str(model), trust_remote_code=trust_remote_code, weights=weights),
            load_tokenizer(str(tokenizer or model), trust_remote_code=trust_remote_code, required=weights),
            quantizers=quantizers,
            granularity=granularity,
            target_modules=target_modules,
            adapter=adapter,
            method=method,
            compute_dtype=compute_dtype,
            bank_dir=bank_dir,
        )

    @classmethod
    def from_model(cls, model: PreTrainedModel, tokenizer: Any = None, **options: Any) -> Backbone:
        """Backbone of a model in memory, which it takes over and changes; options as for `load`."""
        return cls(model, tokenizer, **options)

    def _start(self) -> None:
        if not self.on_meta:
            self._hold_reference()
        for name in self._banks:
            self.adapters.reset(name, 0, seed=0)

    # What it is

    @property
    def on_meta(self) -> bool:
        """Whether there are only shapes, no weights."""
        return any(bank.device.type == "meta" for bank in self._banks.values())

    @property
    def base(self) -> nn.Module:
        """The Hugging Face model inside the PEFT model."""
        base: nn.Module = self.model.get_base_model()
        return base

    @property
    def config(self) -> Any:
        """The Hugging Face configuration."""
        return self.base.config

    @property
    def shapes(self) -> tuple[LayerShape, ...]:
        """Shapes of the layers, in model order."""
        return tuple(layer.shape for layer in self.layers)

    @property
    def banks(self) -> Mapping[str, BankLinear]:
        """Every projection by its qualified name, in model order."""
        return self._banks

    @property
    def fallbacks(self) -> tuple[Fallback, ...]:
        """Projections that a quantizer could not take, met so far by `build_bank` or a memory model."""
        return self.table.fallbacks

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know of the bank: weights that are not in it, and fallbacks, equal ones together."""
        return (*((str(self.coverage),) if self.coverage.left else ()), *told(self.fallbacks))

    def fixed_tensors(self) -> dict[str, torch.Tensor]:
        """Embeddings, head, norms and persistent buffers by name, tied ones once."""
        state = self.base.state_dict(keep_vars=True)
        return {name: state[name].detach() for name in self._fixed_names}

    def digest(self) -> str:
        """SHA-256 of the model's weights, the quantizers' settings, the granularity and the compute dtype.

        Taken from the full-precision reference, so it is computed before that is released, and then remembered.
        """
        if self._digest is None:
            self._digest = self._compute_digest()
        return self._digest

    def _compute_digest(self) -> str:
        settings = {bits: describe(quantizer) for bits, quantizer in self.table.quantizers.items()}
        text = repr((settings, self.granularity, self.target_modules, str(self.compute_dtype)))
        begin = self.adapters.options
        if begin.start is not None or begin.input_group > 1:
            text += repr((begin.init, begin.init_iterations, begin.input_group))
        if self._calibration is not None:
            text += self._calibration.digest
        return _sha256([text, *(f"{name}:{digest}" for name, digest in self._tensor_digests().items())])

    def _tensor_digests(self) -> dict[str, str]:
        # Each tensor is read once: the backbone's digest and the key of its bank are both made of these.
        if self._digests is None:
            with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
                names, tensors = zip(*self._reference_tensors(), strict=True)
                check_finite(dict(zip(names, tensors, strict=True)))
                self._digests = dict(zip(names, pool.map(_tensor_digest, tensors), strict=True))
        return self._digests

    def _reference_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.fixed_tensors().items()
        for name, bank in self._banks.items():
            yield f"{name}.weight", bank.reference
            if bank.bias is not None:
                yield f"{name}.bias", bank.bias

    # The bank

    def calibrate(self, batches: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Take the sequences that quantisers such as GPTQ are fitted to; nothing where the table has no such quantiser.

        The bank and the digest depend on them. The model runs over them, at full precision and without adapters, when
        `build_bank` packs a weight that no store holds. Raises `QuantizationError` when the bank was built with others.
        """
        if not self.table.calibrated:
            return
        layers = [dict(layer.modules) for layer in self.layers]
        calibration = Calibration(self.model, layers, batches)
        if self._calibration is not None and self._calibration.digest == calibration.digest:
            return
        if any(self.table.quantizers[bits].calibrated for bits in self._built):
            raise QuantizationError("the bank was built with other calibration sequences; load the model again")
        self._calibration, self._digest = calibration, None

    def _calibration_digest(self, chosen: Iterable[Chosen]) -> str:
        wanting = next((each for each in chosen if each.quantizer.calibrated), None)
        if wanting is None:
            return ""
        if self._calibration is None:
            raise QuantizationError(
                f"{wanting} is fitted to the inputs of projections: call `backbone.calibrate(batches)` before the bank "
                "is built, or take a quantizer that needs no data, such as 'hqq'"
            )
        # Inputs depend on every weight below, embeddings and norms among them.
        tensors = (f"{name}:{digest}" for name, digest in self._tensor_digests().items())
        return _sha256([self._calibration.digest, str(self.compute_dtype), *tensors])

    def _moments(self, name: str) -> Moments:
        assert self._calibration is not None  # `_plan` has looked
        active = {bank: (bank.active, bank.active_rank) for bank in self._banks.values()}
        for bank in active:
            bank.activate(16)
        try:
            with without_adapters(self.model):
                return self._calibration.moments(name)
        finally:
            for bank, (bits, rank) in active.items():
                bank.activate(bits, rank)

    def build_bank(self, bits: Sequence[int]) -> None:
        """Quantise every projection at each bit-width that is not in the bank yet, or map what a store has of it.

        It goes layer by layer: besides the bank, one packed layer and the quantizer's workspace for one projection are
        in memory, and with a store the bank itself is mapped from its files.
        """
        wanted = [b for b in dict.fromkeys(bits) if b not in self._built]
        missing = [b for b in wanted if any(not bank.holds(b) for bank in self._banks.values())]
        if missing:
            self._require_weights()
            plans = [self._plan(b) for b in missing]
            store = self._store() if any(parts for plan in plans for _, parts in plan.layers) else None
            for index in range(len(self.layers)):
                for plan in plans:
                    self._bank_layer(index, plan, store)
            if self._calibration is not None:
                self._calibration.release()
        self._built.update(wanted)

    def _plan(self, bits: int) -> Plan:
        # Chosen for every layer before the first is packed: what cannot be taken is known at once.
        layers = tuple((layer.name, self._parts(layer, bits)) for layer in self.layers)
        calibration = self._calibration_digest(part.chosen for _, parts in layers for part in parts)
        return Plan(bits, layers, next(iter(self._banks.values())).device.type, calibration)

    def _parts(self, layer: TargetLayer, bits: int) -> tuple[Part, ...]:
        # What must be packed; a weight of 16 bits, in memory or mapped from the checkpoint, is its own packed form.
        parts = (Part(name, bank.shape, self._chosen(layer, name, bits)) for name, bank in layer.modules)
        return tuple(part for part in parts if not self._is_reference(part.chosen, self._banks[part.name]))

    def _chosen(self, layer: TargetLayer, name: str, bits: int) -> Chosen:
        return self.table.choose(layer.name, _local(layer.name, name), self._banks[name].shape, bits)

    @staticmethod
    def _is_reference(chosen: Chosen, bank: BankLinear) -> bool:
        if not isinstance(chosen.quantizer, NoQuantizer) or not bank.has_reference:
            return False
        empty = bank.reference[:0]
        packed = chosen.quantizer.quantize(empty, chosen.bits)[NoQuantizer.CODES]
        return packed.dtype == empty.dtype and bank.reference.is_contiguous()

    def _store(self) -> BankStore | None:
        if self.bank_dir is None:
            return None
        digests = self._tensor_digests()
        weights = _sha256(f"{name}:{digests[f'{name}.weight']}" for name in self._banks)
        model = str(getattr(self.config, "_name_or_path", "") or type(self.base).__name__)
        return BankStore(self.bank_dir, weights=weights, model=model, say=self.say)

    def _bank_layer(self, index: int, plan: Plan, store: BankStore | None) -> None:
        layer, parts = self.layers[index], plan.layers[index][1]
        if all(bank.holds(plan.bits) for _, bank in layer.modules):
            return
        to_pack = {part.name: part.chosen for part in parts}

        def build() -> dict[str, dict[str, torch.Tensor]]:
            return {name: self._packed(name, chosen) for name, chosen in to_pack.items()}

        packed = store.fetch(plan, index, build) if store is not None and parts else build()
        for name, bank in layer.modules:
            chosen = to_pack.get(name) or self._chosen(layer, name, plan.bits)
            tensors = packed[name] if name in packed else self._packed(name, chosen)
            placed = {key: tensor.to(bank.device) for key, tensor in tensors.items()}
            bank.add_variant(plan.bits, Variant(chosen.quantizer, chosen.bits, placed))

    def _packed(self, name: str, chosen: Chosen) -> dict[str, torch.Tensor]:
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

    # The first values of adapters

    def needs_initial(self, choices: Iterable[tuple[int, int]]) -> bool:
        """Whether `build_initial` would have something to do for these bits and ranks."""
        return self.adapters.options.start is not None and any(c not in self._initial for c in choices if c[1])

    def build_initial(
        self, choices: Iterable[tuple[int, int]], *, weightings: Mapping[str, Weighting] | None = None
    ) -> None:
        """Make first values of adapters for these (bits, rank), as `AdapterOptions.init` says; or map what a store has.

        The bank must be built at these bits, and the full-precision reference be there. With one iteration they are
        made for the largest of the ranks, and serve every smaller one; with more, each rank has its own, and its own
        packed weights: as many banks as there are ranks. Weighted starts need the weightings of all projections.
        """
        wanted = sorted({choice for choice in choices if choice[1] and choice not in self._initial})
        options = self.adapters.options
        start = options.start
        if not wanted or start is None:
            return
        if start.weighted and weightings is None:
            raise ConfigurationError(
                f"{options.init!r} needs the Fisher weights of calibration batches, and none were given"
            )
        if not all(bank.has_reference for bank in self._banks.values()):
            raise QuantizationError(
                f"the first values of adapters at (bits, rank) {wanted[0]} were not made before the full-precision "
                "weights were released; load the model again"
            )
        store = self._store()
        for bits, rank in self._initial_runs(wanted):
            self._build_initial(bits, rank, weightings if start.weighted else None, store)
        self._initial.update(wanted)

    def _initial_runs(self, wanted: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        if self.adapters.options.init_iterations > 1:
            return list(wanted)
        held = {bits: factors.rank for (_, bits, _), factors in self._factors.items()}
        largest = dict(wanted)  # sorted: the last of each bit-width
        return [(b, -(-r // BLOCK) * BLOCK) for b, r in largest.items() if r > held.get(b, 0)]

    def _build_initial(
        self, bits: int, rank: int, weightings: Mapping[str, Weighting] | None, store: BankStore | None
    ) -> None:
        weights = weightings or {}

        def part(layer: TargetLayer, name: str) -> Part:
            bank, own = self._banks[name], self._chosen(layer, name, bits)
            digest = weights[name].digest if name in weights else ""
            calibrated = getattr(own.quantizer, "calibrated", False)
            packed = checksum({k: t.cpu() for k, t in bank.require(bits).packed.items()}) if calibrated else ""
            chosen: Any = InitialPart(own, self.adapters.options, rank, digest, packed)
            chosen.check()
            return Part(name, bank.shape, chosen)

        def is_quantized(bank: BankLinear) -> bool:
            return not isinstance(bank.require(bits).quantizer, NoQuantizer)

        layers = tuple(
            (layer.name, tuple(part(layer, name) for name, bank in layer.modules if is_quantized(bank)))
            for layer in self.layers
        )
        plan = Plan(bits, layers, next(iter(self._banks.values())).device.type)
        for index, (_, parts) in enumerate(layers):
            made = self._initial_tensors(plan, index, weights, store) if parts else {}
            for each in parts:
                self._take_initial(each, bits, rank, made[each.name])

    def _initial_tensors(
        self, plan: Plan, index: int, weights: Mapping[str, Weighting], store: BankStore | None
    ) -> dict[str, dict[str, torch.Tensor]]:
        def build() -> dict[str, dict[str, torch.Tensor]]:
            parts: list[Any] = [(part.name, part.chosen) for part in plan.layers[index][1]]
            with torch.no_grad():
                return {n: chosen.build(self._banks[n], plan.bits, weights.get(n)) for n, chosen in parts}

        return build() if store is None else store.fetch(plan, index, build)

    def _take_initial(self, part: Part, bits: int, rank: int, tensors: Mapping[str, torch.Tensor]) -> None:
        packed, factors = divided(dict(tensors))
        bank = self._banks[part.name]
        self._factors[part.name, bits, rank if packed else None] = factors
        if packed:
            placed = {key: tensor.to(bank.device) for key, tensor in packed.items()}
            bank.add_variant(bits, Variant(part.chosen.quantizer, part.chosen.bits, placed), rank=rank)

    def initial_factors(self, name: str, bits: int, rank: int) -> Factors | None:
        """First values of a projection's adapter, before scaling; None where it begins as by default.

        Raises `QuantizationError` where `build_initial` was not asked for them.
        """
        bank = self._banks[name]
        if not rank or self.adapters.options.start is None or isinstance(bank.require(bits).quantizer, NoQuantizer):
            return None
        factors = self._factors.get((name, bits, rank)) or self._factors.get((name, bits, None))
        if factors is None:
            raise QuantizationError(
                f"the first values of adapters at {bits} bits and rank {rank} are not made; call "
                f"`backbone.build_initial([({bits}, {rank})])` after `build_bank` and before the reference is released"
            )
        return factors

    def _hold_reference(self) -> None:
        # 16 bits work from the start, for importance estimators and for reference runs, but are no copy of the model.
        for layer in self.layers:
            for name, bank in layer.modules:
                chosen = self._chosen(layer, name, 16)
                bank.add_variant(16, ReferenceVariant(chosen.quantizer, chosen.bits, bank.reference))

    def release_reference(self) -> None:
        """Drop the full-precision weights, and 16 bits too unless the bank was built with them.

        The digest is computed first. Later `build_bank` of bit-widths that no store holds needs the model to be
        loaded again.
        """
        if not any(bank.has_reference for bank in self._banks.values()):
            return
        self.digest()
        for bank in self._banks.values():
            bank.release_reference()
            if 16 not in self._built:
                bank.drop_variant(16)

    def install(
        self, packed: Mapping[str, tuple[int, Variant, torch.Tensor | None]], *, digest: str | None = None
    ) -> None:
        """Fill a backbone without weights from stored ones: for each projection its bits, packed weight and bias."""
        missing = sorted(self._banks.keys() ^ packed.keys())
        if missing:
            raise ConfigurationError(f"the stored projections are not those of the model; the first is {missing[0]!r}")
        for name, (bits, variant, bias) in packed.items():
            self._banks[name].install(bits, variant, bias)
        self._digest = digest

    def dense_cache(self, mode: bool | str) -> None:
        """Keep dequantised weights in memory: "off", "on", or "auto" (while memory allows); True is "on", False "off".

        Results are the same to the bit. All projections share one allowance: see `DenseCache`.
        """
        self._dense = DenseCache(dense_cache_mode(mode))
        for bank in self._banks.values():
            bank.set_dense_cache(self._dense)

    @property
    def keeps_dense(self) -> bool:
        """Whether all dense weights of the active configuration are kept, whatever memory they take."""
        return self._dense.mode == "on"

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations block by block in the backward pass."""
        base: Any = self.base
        if hasattr(base, "activation_checkpointing_enable"):  # transformers 5.x renamed it
            base.activation_checkpointing_enable({"use_reentrant": False})
        else:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.config.use_cache = False

    def activate(self, configuration: Configuration, *, seed: int) -> None:
        """Switch in place: the bits of each layer, and fresh adapters seeded by (seed, module name).

        Raises `ConfigurationError` when it is of another number of layers, `QuantizationError` when a bit-width is not
        in the bank. Adapter parameters are new objects afterwards: make a new optimiser.
        """
        self.prepare([configuration])
        choices = list(zip(self.layers, configuration.layers, strict=True))
        factors: dict[str, Factors | None] = {}
        for layer, choice in choices:  # all or nothing: look before the first switch
            for name, bank in layer.modules:
                bank.require(choice.bits)
                factors[name] = self.initial_factors(name, choice.bits, choice.rank)
        for layer, choice in choices:
            for name, bank in layer.modules:
                bank.activate(choice.bits, choice.rank)
                self.adapters.reset(name, choice.rank, seed=seed, factors=factors[name])
        self.configuration = configuration

    def keep_active(self) -> None:
        """Drop the packed weights that the active configuration does not use, and the reference."""
        self.release_reference()
        for bank in self._banks.values():
            bank.keep_active()
        self._built.clear()

    def prepare(self, configurations: Sequence[Configuration]) -> None:
        """Look at memory anew before a switch to these; raises as `activate` does unless there are weights for them."""
        self._require_weights()
        for configuration in configurations:
            self._require_length(configuration)
        self._dense.next_generation()

    def _require_length(self, configuration: Configuration) -> None:
        if len(configuration) != len(self.layers):
            raise ConfigurationError(
                f"the model has {len(self.layers)} layers, but the configuration has {len(configuration)}"
            )

    def _require_weights(self) -> None:
        if self.on_meta:
            raise QuantizationError("the backbone was loaded without weights; load it with `weights=True`")

    # The adapters

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters of the adapters, in model order."""
        return self.adapters.parameters()

    def adapter_state(self) -> dict[str, torch.Tensor]:
        """Copies of the adapters' float32 masters by name."""
        return self.adapters.state()

    def load_adapter_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put masters in place; raises `ConfigurationError` when they are of another configuration."""
        self.adapters.load(state)

    def stored_precision(self) -> AbstractContextManager[None]:
        """Context in which the adapters have the 16-bit values that are stored, so that scores are of those."""
        return self.adapters.stored_precision()

    def describe(self) -> dict[str, str]:
        """The precision of adapters in training and as stored."""
        return self.adapters.describe()

    def save_adapter(self, directory: str | Path, configuration: Configuration) -> None:
        """Write the adapters for plain PEFT, in the stored 16 bits; the configuration must be the active one."""
        if configuration != self.configuration:
            raise ConfigurationError(f"the active configuration is {self.configuration}, not {configuration}")
        self.adapters.save(directory)

    # Bytes

    def adapter_bytes(self, shape: LayerShape, rank: int) -> int:
        """Bytes of the adapters of a layer at a rank, as they are stored."""
        shapes = [(d_out, d_in) for _, d_in, d_out in shape.projections]
        return stored_bytes(self.adapters.method, self.adapters.options, shapes, rank)


def _sha256(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _tensor_digest(tensor: torch.Tensor) -> str:
    hasher = hashlib.sha256(f"{tensor.dtype}:{tuple(tensor.shape)}".encode())
    hasher.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def _local(layer: str, name: str) -> str:
    # A projection's name within its layer; layers that are no module (feed_forward) keep the last part.
    return name.removeprefix(f"{layer}.") if name.startswith(f"{layer}.") else name.rpartition(".")[2]


def _cast(model: nn.Module, dtype: torch.dtype, *, keep: set[str]) -> None:
    # Parameters only: buffers such as rotary frequencies must keep their float32.
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if parameter.is_floating_point() and name.rpartition(".")[0] not in keep:
            parameter.data = parameter.data.to(dtype)


def _bank_layer(model: nn.Module, names: LayerNames) -> TargetLayer:
    modules = tuple((name, _replace(model, name)) for name in names.projections)
    projections = tuple((_local(names.name, name), bank.in_features, bank.out_features) for name, bank in modules)
    constant = sum(bank.bias.nbytes for _, bank in modules if bank.bias is not None)
    return TargetLayer(names.name, LayerShape(names.name, projections, constant), modules)


def _replace(model: nn.Module, name: str) -> BankLinear:
    module: Any = model.get_submodule(name)
    weight = module.weight.t() if is_conv1d(module) else module.weight
    bank = BankLinear(weight, module.bias)
    bank.train(module.training)
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, bank)
    return bank


def _distinct(model: nn.Module) -> tuple[str, ...]:
    # Tied tensors have several names: the first counts.
    first: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        first.setdefault(id(tensor), name)
    return tuple(first.values())
