"""Our own format: the packed mixed-precision base of one configuration, in safetensors and JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qratk.adapters.base import AdapterMethod, adapters
from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError, QuantizationError
from qratk.core.intact import require_intact, write_sums
from qratk.exporters.base import Exporter, Holding, exporters
from qratk.quantizers.base import Quantizer, quantizers

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn

    from qratk.backbone.backbone import Backbone
    from qratk.bank.linear import BankLinear, Variant

FORMAT, VERSION = "qratk-quantized", 2
METHOD = "qratk"
"""`quant_method` of `config.json`, for transformers."""
CODES = "weight"
"""Name of the codes in a folder: whoever does not know the form finds a weight of a wrong shape, and not none."""
DESCRIPTION, LAYERS, FIXED = "quantized.json", "quantized.safetensors", "fixed.safetensors"


@exporters.register("packed")
class PackedExporter(Exporter):
    """The packed mixed-precision base in qratk's own format, and the adapter for PEFT beside it, in `adapter`.

    The smallest form. `load_quantized` reads it, and after `import qratk` transformers does.
    """

    @property
    def takes(self) -> str:
        """qratk, and transformers with it."""
        return "qratk (`load_quantized`), and transformers after `import qratk`"

    @property
    def holds(self) -> Holding:
        """Everything."""
        return Holding(
            "every quantiser, as packed; embeddings, head and norms in 16 bits where these hold their numbers",
            "every method, for PEFT in the folder `adapter`",
            "equal to the bit on one processor; from another one to rounding of sums",
        )

    def reload(self, backbone: Backbone, directory: Path) -> nn.Module:
        """The base of the folder with the adapter beside it."""
        from qratk.adapters.matrices.folder import read_pairs
        from qratk.exporters._reading import bank_tensors, reading_model

        again = load_quantized(directory)
        pairs = read_pairs(directory / "adapter") if (directory / "adapter").exists() else {}
        return reading_model(again, again.config, bank_tensors(again), pairs=pairs)

    def check(self, backbone: Backbone) -> None:
        """Raise `QuantizationError` when a quantizer or the adapter method is not registered: a file cannot name it."""
        _specification(backbone.adapters.method)
        for quantizer in backbone.table.quantizers.values():
            _specification(quantizer)

    def write(self, backbone: Backbone, directory: Path) -> None:
        """Write the base, and the adapter where there is one."""
        assert backbone.configuration is not None
        save_quantized(backbone, backbone.configuration, directory)
        if any(backbone.configuration.ranks):
            backbone.save_adapter(directory / "adapter", backbone.configuration)


def save_quantized(backbone: Backbone, configuration: Configuration, directory: str | Path) -> Path:
    """Directory with the packed base of a configuration, complete without the original checkpoint.

    `quantized.safetensors` holds the layers, `<projection>.<part>`, with the codes as `weight`: its tensors take
    exactly the predicted storage bytes less the adapters. `fixed.safetensors` holds embeddings, head and norms, in 16
    bits where these hold their numbers. `quantized.json` says bits and quantizer of each projection, and the adapter
    method; `config.json` (with layouts for transformers), `model.safetensors.index.json`, `generation_config.json` and
    the tokenizer are Hugging Face's. Adapters are saved apart.
    """
    from safetensors.torch import save_file

    from qratk.exporters._folder import write_description
    from qratk.exporters._grids import narrowest
    from qratk.exporters._shards import write_index

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    choices = _choices(backbone, configuration)
    tensors: dict[str, torch.Tensor] = {}
    for name, bank in backbone.banks.items():
        parts = dict(bank.require(*choices[name]).packed)
        if bank.bias is not None:
            parts["bias"] = bank.bias
        tensors |= {f"{name}.{_stored(part)}": tensor.cpu().contiguous() for part, tensor in parts.items()}
    save_file(tensors, directory / LAYERS, metadata={"format": "pt"})
    dtype, parameters = narrowest(backbone), {name for name, _ in backbone.base.named_parameters()}
    fixed = {
        name: (tensor.to(dtype) if name in parameters and tensor.is_floating_point() else tensor).cpu().contiguous()
        for name, tensor in backbone.fixed_tensors().items()
    }
    save_file(fixed, directory / FIXED, metadata={"format": "pt"})
    write_index({LAYERS: tensors, FIXED: fixed}, directory)
    settings = _settings(backbone, choices, tensors)
    write_description(backbone, directory, dtype=backbone.compute_dtype, more={"quantization_config": settings})
    text = json.dumps(_description(backbone, configuration, choices), indent=2)
    (directory / DESCRIPTION).write_text(text + "\n", encoding="utf-8")
    write_sums(directory)
    return directory


def load_quantized(directory: str | Path, *, trust_remote_code: bool = False) -> Backbone:
    """Backbone with that one configuration active (rank 0: load adapters or `activate` for others); same logits.

    Its adapters are of the method that was saved; of plain LoRA where a file of before does not say.
    Raises `ConfigurationError` when the directory is not of this format, or damaged.
    """
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    from qratk.adapters.options import AdapterOptions
    from qratk.backbone.backbone import Backbone
    from qratk.exporters._folder import GENERATION
    from qratk.exporters._skeleton import empty_model, fill

    directory = require_intact(directory)
    description = read_description(directory)
    config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = empty_model(AutoModelForCausalLM, config)
    if (directory / GENERATION).exists():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    fill(model, load_file(directory / FIXED))
    backbone = Backbone.from_model(
        model,
        _tokenizer(directory, trust_remote_code=trust_remote_code),
        quantizers={int(bits): _quantizer(spec) for bits, spec in description["quantizers"].items()},
        granularity=description["granularity"],
        target_modules=description["target_modules"],
        adapter=AdapterOptions(**description["adapter"]),
        method=_method(description.get("method")),
        compute_dtype=description["compute_dtype"],
    )
    backbone.install(_variants(description, load_file(directory / LAYERS)), digest=description["digest"])
    configuration = Configuration.from_text(description["configuration"])
    backbone.activate(Configuration.of(configuration.bits, [0] * len(configuration)), seed=0)
    return backbone


def read_description(directory: str | Path) -> dict[str, Any]:
    """What `quantized.json` says; raises `ConfigurationError` when it is missing or of another format."""
    path = Path(directory) / DESCRIPTION
    try:
        description: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigurationError(
            f"{directory} holds no quantised model: {path.name} cannot be read ({error})"
        ) from error
    if description.get("format") != FORMAT or description.get("version") not in (1, VERSION):
        raise ConfigurationError(
            f"{path}: expected format {FORMAT!r} version {VERSION} or 1, got {description.get('format')!r} "
            f"version {description.get('version')!r}"
        )
    return description


def stored_bytes(directory: str | Path) -> int:
    """Bytes of the layers' tensors in the directory, read from the file's header."""
    from safetensors import safe_open

    with safe_open(Path(directory) / LAYERS, framework="pt") as file:
        return sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118


def _choices(backbone: Backbone, configuration: Configuration) -> dict[str, tuple[int, int]]:
    # Bits and rank of each projection: a weight may have been packed for a rank.
    if len(configuration) != len(backbone.layers):
        raise ConfigurationError(
            f"the model has {len(backbone.layers)} layers, but the configuration has {len(configuration)}"
        )
    choices = {
        name: (choice.bits, choice.rank)
        for layer, choice in zip(backbone.layers, configuration.layers, strict=True)
        for name, _ in layer.modules
    }
    for name, bank in backbone.banks.items():
        bank.require(*choices[name])
    return choices


def _description(
    backbone: Backbone, configuration: Configuration, choices: Mapping[str, tuple[int, int]]
) -> dict[str, Any]:
    target = backbone.target_modules
    return {
        "format": FORMAT,
        "version": VERSION,
        "configuration": str(configuration),
        "granularity": backbone.granularity,
        "target_modules": target if isinstance(target, str) else list(target),
        "compute_dtype": str(backbone.compute_dtype).removeprefix("torch."),
        # What adapters began with was made of weights that are not here: fresh ones begin as by default.
        "adapter": asdict(replace(backbone.adapters.options, init="default", init_iterations=1)),
        "method": _specification(backbone.adapters.method),
        "digest": backbone.digest(),
        "quantizers": {b: _specification(quantizer) for b, quantizer in backbone.table.quantizers.items()},
        "projections": {name: _projection(bank, *choices[name]) for name, bank in backbone.banks.items()},
    }


def _settings(
    backbone: Backbone, choices: Mapping[str, tuple[int, int]], tensors: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """`quantization_config` of config.json: see `PackedConfig`."""
    layouts: dict[str, dict[str, Any]] = {}
    projections: dict[str, int] = {}
    for name, bank in backbone.banks.items():
        variant = bank.require(*choices[name])
        names = [*map(_stored, variant.packed), *(("bias",) if bank.bias is not None else ())]
        parts = {part: tensors[f"{name}.{part}"] for part in names}
        layout = {
            "quantizer": _specification(variant.quantizer),
            "bits": variant.bits,
            "shape": list(bank.shape),
            "parts": {part: [str(t.dtype).removeprefix("torch."), list(t.shape)] for part, t in parts.items()},
        }
        key = json.dumps(layout, sort_keys=True)
        layouts.setdefault(key, layout)
        projections[name] = list(layouts).index(key)
    return {"quant_method": METHOD, "layouts": list(layouts.values()), "projections": projections}


def _stored(part: str) -> str:
    """The name of a packed tensor in a folder."""
    return CODES if part == Quantizer.CODES else part


def _projection(bank: BankLinear, bits: int, rank: int) -> dict[str, Any]:
    variant = bank.require(bits, rank)
    return {
        "bits": bits,
        "packed_bits": variant.bits,
        "shape": list(bank.shape),
        "quantizer": _specification(variant.quantizer),
    }


def _specification(component: Quantizer | AdapterMethod) -> dict[str, Any]:
    from qratk.bank.table import options

    name = component.component_name
    if name is None:
        raise QuantizationError(f"{type(component).__name__} is not registered, so a file cannot name it; register it")
    return {"name": name, "options": options(component)}


def _quantizer(specification: Mapping[str, Any]) -> Quantizer:
    return quantizers.create(specification["name"], **specification["options"])


def _method(specification: Mapping[str, Any] | None) -> AdapterMethod | None:
    return None if specification is None else adapters.create(specification["name"], **specification["options"])


def _variants(
    description: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> dict[str, tuple[int, Variant, torch.Tensor | None]]:
    from qratk.bank.linear import PackedVariant

    parts: dict[str, dict[str, torch.Tensor]] = {}
    former = description["version"] == 1
    for key, tensor in tensors.items():
        name, _, part = key.rpartition("/" if former else ".")
        parts.setdefault(name, {})[Quantizer.CODES if part == CODES and not former else part] = tensor
    found: dict[str, tuple[int, Variant, torch.Tensor | None]] = {}
    for name, projection in description["projections"].items():
        if name not in parts:
            raise ConfigurationError(f"{LAYERS} holds no tensors of {name!r}; the directory is incomplete")
        bias = parts[name].pop("bias", None)
        variant = PackedVariant(_quantizer(projection["quantizer"]), int(projection["packed_bits"]), parts[name])
        found[name] = (int(projection["bits"]), variant, bias)
    return found


def _tokenizer(directory: Path, *, trust_remote_code: bool) -> Any:
    if not (directory / "tokenizer_config.json").exists():
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
