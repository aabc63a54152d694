"""The backbone: a causal language model whose projections live in the bank, and whose adapters change rank in place."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qratk.backbone.adapters import AdapterOptions, Adapters
from qratk.backbone.bank import BankLinear, Variant
from qratk.backbone.dense import DenseCache, dense_cache_mode
from qratk.backbone.layers import Granularity, LayerNames, TargetLayer, find_blocks, find_layers, is_conv1d
from qratk.backbone.memory import ModelFacts, memory_model
from qratk.backbone.table import Fallback, QuantizerTable, describe
from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError, QuantizationError, UnsupportedModelError
from qratk.core.memory import LayerShape, MemoryModel
from qratk.core.space import SearchSpace
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
        compute_dtype: str | torch.dtype = "auto",
    ) -> None:
        self.tokenizer = tokenizer
        self.table = QuantizerTable(quantizers)
        self.granularity: Granularity = granularity
        self.target_modules = target_modules
        self.compute_dtype = resolve_dtype(compute_dtype)
        self.configuration: Configuration | None = None
        self._built: set[int] = set()
        self._digest: str | None = None
        names = find_layers(model, granularity=granularity, target_modules=target_modules)
        self._num_blocks = len(find_blocks(model)[1])
        _cast(model, self.compute_dtype, keep={name for layer in names for name in layer.projections})
        self.layers = tuple(_bank_layer(model, layer) for layer in names)
        self._banks = {name: bank for layer in self.layers for name, bank in layer.modules}
        self._fixed_names = _distinct(model)
        self.dense_cache("off")
        self.adapters = Adapters(model, self._banks, adapter or AdapterOptions())
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
        compute_dtype: str | torch.dtype = "auto",
        trust_remote_code: bool = False,
        tokenizer: str | None = None,
        weights: bool = True,
    ) -> Backbone:
        """Backbone of a Hugging Face name or local directory.

        Without `weights` it is built on the meta device from the configuration alone: enough for `memory_model`, and
        the tokenizer may then be missing. Raises `UnsupportedModelError`, saying what could not be loaded.
        """
        return cls(
            _load_model(str(model), trust_remote_code=trust_remote_code, weights=weights),
            _load_tokenizer(str(tokenizer or model), trust_remote_code=trust_remote_code, required=weights),
            quantizers=quantizers,
            granularity=granularity,
            target_modules=target_modules,
            adapter=adapter,
            compute_dtype=compute_dtype,
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
        """Projections that a quantizer could not take, met so far by `build_bank` or `memory_model`."""
        return self.table.fallbacks

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
        hasher = hashlib.sha256()
        settings = {bits: describe(quantizer) for bits, quantizer in self.table.quantizers.items()}
        hasher.update(repr((settings, self.granularity, self.target_modules, str(self.compute_dtype))).encode())
        for name, tensor in self._reference_tensors():
            hasher.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            hasher.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return hasher.hexdigest()

    def _reference_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.fixed_tensors().items()
        for name, bank in self._banks.items():
            yield f"{name}.weight", bank.reference
            if bank.bias is not None:
                yield f"{name}.bias", bank.bias

    # The bank

    def build_bank(self, bits: Sequence[int]) -> None:
        """Quantise every projection at each bit-width that is not in the bank yet."""
        for b in bits:
            if b in self._built:
                continue
            self._require_weights()
            for layer in self.layers:
                for name, bank in layer.modules:
                    bank.add_variant(b, self._packed(layer, name, bank, b))
            self._built.add(b)

    def _packed(self, layer: TargetLayer, name: str, bank: BankLinear, bits: int) -> Variant:
        if bits in bank.variants:
            return bank.variants[bits]
        chosen = self.table.choose(layer.name, _local(layer.name, name), bank.shape, bits)
        with torch.no_grad():
            packed = chosen.quantizer.quantize(bank.reference, chosen.bits)
        return Variant(chosen.quantizer, chosen.bits, packed)

    def _hold_reference(self) -> None:
        # 16 bits work from the start: for importance estimators and for reference runs.
        for layer in self.layers:
            for name, bank in layer.modules:
                bank.add_variant(16, self._packed(layer, name, bank, 16))

    def release_reference(self) -> None:
        """Drop the full-precision weights, and 16 bits too unless the bank was built with them.

        The digest is computed first. Later `build_bank` of new bit-widths needs the model to be loaded again.
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
        self._require_weights()
        if len(configuration) != len(self.layers):
            raise ConfigurationError(
                f"the model has {len(self.layers)} layers, but the configuration has {len(configuration)}"
            )
        self._dense.next_generation()
        choices = list(zip(self.layers, configuration.layers, strict=True))
        for layer, choice in choices:  # all or nothing: look before the first switch
            for _, bank in layer.modules:
                bank.require(choice.bits)
        for layer, choice in choices:
            for name, bank in layer.modules:
                bank.activate(choice.bits)
                self.adapters.reset(name, choice.rank, seed=seed)
        self.configuration = configuration

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

    def memory_model(
        self,
        space: SearchSpace,
        *,
        batch_size: int = 1,
        sequence_length: int = 512,
        gradient_checkpointing: bool = False,
    ) -> MemoryModel:
        """Exact bytes of any configuration of the space, and estimated peaks for this batch and length."""
        fixed = sum(tensor.nbytes for tensor in self.fixed_tensors().values())
        facts = ModelFacts.of(
            self.config, num_blocks=self._num_blocks, item_size=self.compute_dtype.itemsize, fixed_bytes=fixed
        )
        return memory_model(
            space,
            self.shapes,
            self.table,
            facts,
            batch_size=batch_size,
            sequence_length=sequence_length,
            gradient_checkpointing=gradient_checkpointing,
        )


def resolve_dtype(compute_dtype: str | torch.dtype) -> torch.dtype:
    """The compute dtype; "auto" is bfloat16 where CUDA has it, and float32 elsewhere (16-bit matmul on CPU is slow)."""
    if isinstance(compute_dtype, torch.dtype):
        return compute_dtype
    if compute_dtype == "auto":
        cuda = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if cuda else torch.float32
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if compute_dtype not in known:
        raise ConfigurationError(f"compute_dtype must be 'auto' or one of {tuple(known)}, got {compute_dtype!r}")
    return known[compute_dtype]


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


def _dtype_argument() -> str:
    import transformers

    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    return "dtype" if (major, minor) >= (4, 56) else "torch_dtype"


def _load_model(name: str, *, trust_remote_code: bool, weights: bool) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        if weights:
            dtype: Any = {_dtype_argument(): "auto"}
            return AutoModelForCausalLM.from_pretrained(name, trust_remote_code=trust_remote_code, **dtype)
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        stored = getattr(config, _dtype_argument(), None) or torch.float32
        options: Any = {_dtype_argument(): stored, "trust_remote_code": trust_remote_code}
        auto: Any = AutoModelForCausalLM
        with torch.device("meta"):
            model: PreTrainedModel = auto.from_config(config, **options)
        return model
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(
            f"the model {name!r} cannot be loaded as a causal language model: {_first_line(error)} "
            "Give a Hugging Face name, or a directory with config.json and safetensors files"
        ) from error


def _load_tokenizer(name: str, *, trust_remote_code: bool, required: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizer classes raise whatever their files make them raise
        if not required:
            return None
        raise UnsupportedModelError(
            f"no tokenizer can be loaded from {name!r}: {_first_line(error)} Give one with the option 'tokenizer'"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
