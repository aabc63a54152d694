"""The backbone: a causal language model whose projections live in the bank, and whose adapters change rank in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qratk.adapters.base import AdapterMethod, Adapters, stored_bytes
from qratk.adapters.lora import Lora
from qratk.adapters.matrices.factors import Factors, Told
from qratk.adapters.options import AdapterOptions
from qratk.adapters.starts.making import FirstValues, Inputs
from qratk.backbone.attention import use_short_backward
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
from qratk.bank.build import Packer
from qratk.bank.calibration import Calibration
from qratk.bank.dense import DenseCache, dense_cache_mode
from qratk.bank.digests import sha256_of, tensor_digest, weights_digest
from qratk.bank.linear import BankLinear, Variant
from qratk.bank.store import BankStore, bank_directory, log
from qratk.bank.table import Fallback, QuantizerTable, describe, local_name, told
from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError, QuantizationError
from qratk.core.intact import write_sums
from qratk.core.memory import LayerShape
from qratk.quantizers.base import Quantizer

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = ["AdapterOptions", "Backbone", "Fallback", "TargetLayer"]


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
        self.compute_dtype = resolve_dtype(compute_dtype, stored=model.dtype)
        self.configuration: Configuration | None = None
        self._digest: str | None = None
        self._digests: dict[str, str] | None = None
        self.bank_dir = bank_directory(bank_dir)
        self.say: Callable[[str], None] = log
        names = find_layers(model, granularity=granularity, target_modules=target_modules)
        _cast(model, self.compute_dtype, keep={name for layer in names for name in layer.projections})
        if self.compute_dtype == torch.bfloat16:
            use_short_backward(model)
        self.layers = tuple(_bank_layer(model, layer) for layer in names)
        self._banks = {name: bank for layer in self.layers for name, bank in layer.modules}
        self._fixed_names = _distinct(model)
        self.coverage: Coverage = coverage(model)
        self.dense_cache("off")
        self._adapter_options = adapter or AdapterOptions()
        self.adapters: Adapters = (method or Lora()).wrap(model, self._banks, self._adapter_options)
        self.model: PeftModel = self.adapters.peft_model
        layers = [(layer.name, layer.modules) for layer in self.layers]
        self._packer = Packer(layers, self.table, bare=lambda: without_adapters(self.model))
        self._first_values: dict[str, FirstValues] = {}
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
            self._packer.hold_reference()
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
        begin = self._adapter_options
        if begin.start is not None or begin.input_group > 1:
            text += repr((begin.init, begin.init_iterations, begin.input_group))
        if self._packer.calibration is not None:
            text += self._packer.calibration.digest
        return sha256_of([text, *(f"{name}:{digest}" for name, digest in self._tensor_digests().items())])

    def _tensor_digests(self) -> dict[str, str]:
        # Each tensor is read once: the backbone's digest and the key of its bank are both made of these.
        if self._digests is None:
            with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
                names, tensors = zip(*self._reference_tensors(), strict=True)
                check_finite(dict(zip(names, tensors, strict=True)))
                self._digests = dict(zip(names, pool.map(tensor_digest, tensors), strict=True))
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
        if self.table.calibrated and self._packer.calibrate(self._calibration(batches)):
            self._digest = None

    def _calibration(self, batches: Sequence[Mapping[str, torch.Tensor]]) -> Calibration:
        return Calibration(self.model, [dict(layer.modules) for layer in self.layers], batches)

    def build_bank(self, bits: Sequence[int]) -> None:
        """Quantise every projection at each bit-width that is not in the bank yet, or map what a store has of it."""
        if self._packer.missing(bits):
            self._require_weights()
        self._packer.build(bits, self._store, self._decisive)

    def _decisive(self) -> list[str]:
        # Inputs of projections depend on every weight below, embeddings and norms among them.
        return [str(self.compute_dtype), *(f"{name}:{digest}" for name, digest in self._tensor_digests().items())]

    def _store(self) -> BankStore | None:
        if self.bank_dir is None:
            return None
        weights = weights_digest(self._banks, self._tensor_digests())
        model = str(getattr(self.config, "_name_or_path", "") or type(self.base).__name__)
        return BankStore(self.bank_dir, weights=weights, model=model, say=self.say)

    # The first values of adapters

    def adapter_options(self, configuration: Configuration) -> AdapterOptions:
        """How the adapters of a configuration are scaled, dropped and begun: its shared settings may say so."""
        return self._adapter_options.with_shared(configuration.shared)

    def needs_initial(self, choices: Iterable[tuple[int, int]], *, init: str | None = None) -> bool:
        """Whether `build_initial` would have something to do for these bits and ranks."""
        return self._starting(init).needs(choices)

    def build_initial(
        self,
        choices: Iterable[tuple[int, int]],
        *,
        weightings: Mapping[str, Told] | None = None,
        calibration: Sequence[Mapping[str, torch.Tensor]] | None = None,
        init: str | None = None,
    ) -> None:
        """Make first values of adapters for these (bits, rank); or map what a store has.

        The start is `init`, or that of the adapters' options; `calibration` holds the sequences that one such as "cloq"
        is fitted to. The bank must be built at these bits, and the full-precision reference be there.
        """
        if calibration is None:
            self._starting(init).build(choices, weightings, self._store)
            return
        gathered = self._calibration(calibration)
        digest = sha256_of([gathered.digest, *self._decisive()])[:16]
        inputs = Inputs(digest, lambda name: self._packer.moments(gathered, name))
        self._starting(init).build(choices, weightings, self._store, inputs)

    def initial_factors(self, name: str, bits: int, rank: int, *, init: str | None = None) -> Factors | None:
        """First values of a projection's adapter, before scaling; None where it begins as by default.

        Raises `QuantizationError` where `build_initial` was not asked for them.
        """
        return self._starting(init).factors(name, bits, rank)

    def _starting(self, init: str | None) -> FirstValues:
        options = self._adapter_options if init is None else replace(self._adapter_options, init=init)
        if options.init not in self._first_values:
            layers = [(layer.name, layer.modules) for layer in self.layers]
            self._first_values[options.init] = FirstValues(layers, options, self.table)
        return self._first_values[options.init]

    def release_reference(self) -> None:
        """Drop the full-precision weights, and 16 bits too unless the bank was built with them.

        The digest is computed first. Later `build_bank` of bit-widths that no store holds needs the model to be
        loaded again.
        """
        if not any(bank.has_reference for bank in self._banks.values()):
            return
        self.digest()
        self._packer.release_reference()

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
        """Switch in place: the bits of each layer, and fresh adapters seeded by (seed, module name), scaled as it says.

        Raises `ConfigurationError` when it is of another number of layers, `QuantizationError` when a bit-width is not
        in the bank. Adapter parameters are new objects afterwards: make a new optimiser.
        """
        self.prepare([configuration])
        options, trained = self.adapter_options(configuration), self.adapters.method.trained(configuration)
        factors: dict[str, Factors | None] = {}
        # All or nothing: look before the first switch.
        for layer, choice in zip(self.layers, trained.layers, strict=True):
            for name, bank in layer.modules:
                bank.require(choice.bits)
                factors[name] = self.initial_factors(name, choice.bits, choice.rank, init=options.init)
        self.adapters.configure(options)
        for layer, choice in zip(self.layers, configuration.layers, strict=True):
            for name, bank in layer.modules:
                bank.activate(choice.bits, choice.rank)
                self.adapters.reset(name, choice.rank, seed=seed, factors=factors[name])
        self.configuration = configuration

    def keep_active(self) -> None:
        """Drop the packed weights that the active configuration does not use, and the reference."""
        self.release_reference()
        self._packer.keep_active()

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
        """Write the active configuration's adapters for plain PEFT, in the stored 16 bits, with their digests."""
        if configuration != self.configuration:
            raise ConfigurationError(f"the active configuration is {self.configuration}, not {configuration}")
        self.adapters.save(directory)
        write_sums(Path(directory))

    # Bytes

    def adapter_bytes(self, shape: LayerShape, rank: int) -> int:
        """Bytes of the adapters of a layer at a rank, as they are stored."""
        shapes = [(d_out, d_in) for _, d_in, d_out in shape.projections]
        return stored_bytes(self.adapters.method, self.adapters.options, shapes, rank)


def _cast(model: nn.Module, dtype: torch.dtype, *, keep: set[str]) -> None:
    # Parameters only: buffers such as rotary frequencies must keep their float32.
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if parameter.is_floating_point() and name.rpartition(".")[0] not in keep:
            parameter.data = parameter.data.to(dtype)


def _bank_layer(model: nn.Module, names: LayerNames) -> TargetLayer:
    modules = tuple((name, _replace(model, name)) for name in names.projections)
    projections = tuple((local_name(names.name, name), bank.in_features, bank.out_features) for name, bank in modules)
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
