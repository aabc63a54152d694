"""From options to what they name: quantisers, the adapter method, the backbone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from qratk.adapters.base import AdapterMethod, adapters
from qratk.backbone.backbone import Backbone
from qratk.backbone.loading import load_config, load_tokenizer
from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError
from qratk.data.attached import Attached
from qratk.quantizers.base import Quantizer, quantizers
from qratk.quantizers.sets import quantizer_set
from qratk.training.options import FineTuneOptions, Specified


def built_backbone(options: FineTuneOptions, *, weights: bool = True) -> Backbone:
    """A new backbone with the options; without weights it lies on the meta device."""
    return Backbone.load(
        _model_path(options.model),
        quantizers=built_quantizers(options.quantizers),
        granularity=options.granularity,
        target_modules=options.target_modules,
        adapter=options.adapters,
        method=built_adapter(options.adapter, {"adalora": options.adalora}),
        compute_dtype=options.compute_dtype,
        trust_remote_code=options.trust_remote_code,
        tokenizer=None if options.tokenizer is None else os.path.expanduser(options.tokenizer),
        weights=weights,
        bank_dir=options.bank_dir,
    )


def built_tokenizer(options: FineTuneOptions) -> Attached:
    """The tokenizer of the options and what the model can see, from their own files. Raises `UnsupportedModelError`."""
    path = _model_path(options.model)
    trusted = options.trust_remote_code
    name = path if options.tokenizer is None else os.path.expanduser(options.tokenizer)
    config = load_config(path, trust_remote_code=trusted)
    return Attached(load_tokenizer(name, trust_remote_code=trusted, required=True), context_length(config))


def built_quantizers(specified: Mapping[int, Specified | Quantizer] | str | None) -> dict[int, Quantizer]:
    """Quantiser of each bit-width, from the name of a set, or from names or {class_path, init_args} by bits.

    What is not given is the default.
    """
    own: Mapping[int, Any] = quantizer_set(specified) if isinstance(specified, str) else specified or {}
    built: dict[int, Quantizer] = {}
    for bits, chosen in {**quantizer_set("default"), **{int(b): q for b, q in own.items()}}.items():
        if isinstance(chosen, Quantizer):
            built[bits] = chosen
            continue
        given, options = _name_and_options(chosen, "a quantiser")
        name = quantizers.name_of(given) or given
        built[bits] = quantizers.create(name, **options)
        if bits not in built[bits].supported_bits:
            raise ConfigurationError(f"quantiser {name!r} does {built[bits].supported_bits} bits, not {bits}")
    return built


def built_adapter(given: Specified, options: Mapping[str, Mapping[str, Any] | None]) -> AdapterMethod:
    """Method of adapters from a name or {class_path, init_args}, with the options that are given under its name.

    Raises `ConfigurationError` for options of another method.
    """
    name, own = _name_and_options(given, "an adapter")
    name = adapters.name_of(name) or name
    for other, more in options.items():
        if more and other != name:
            raise ConfigurationError(
                f"the options {sorted(more)} are those of the adapter {other!r}, and the adapter is {name!r}; "
                f"give --model.adapter={other}, or leave --model.{other} out"
            )
    return adapters.create(name, **{**own, **(options.get(name) or {})})


def spread(configuration: Configuration, num_layers: int) -> Configuration:
    """Configuration of `num_layers` layers, at the same settings; one choice alone counts for all of them."""
    if len(configuration) == 1:
        return Configuration(configuration.layers * num_layers, configuration.shared)
    if len(configuration) != num_layers:
        raise ConfigurationError(
            f"the model has {num_layers} layers, but the configuration has {len(configuration)}: {configuration}"
        )
    return configuration


def context_length(config: Any) -> int | None:
    """Tokens that a model of a configuration can see; of a composite one, as of vision and language, its text part."""
    length: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length


def _name_and_options(chosen: Specified, one: str) -> tuple[str, dict[str, Any]]:
    if isinstance(chosen, str):
        return chosen, {}
    if "class_path" in chosen and set(chosen) <= {"class_path", "init_args"}:
        return str(chosen["class_path"]), dict(chosen.get("init_args") or {})
    if len(chosen) == 1 and "class_path" not in chosen:
        ((name, options),) = chosen.items()
        if options is None or isinstance(options, Mapping):
            return str(name), dict(options or {})
    raise ConfigurationError(
        f"{one} is a name, {{name: options}} or {{class_path, init_args}}, got {dict(chosen)}; give "
        "it whole, an option alone changes nothing of one that was given before"
    )


def _model_path(model: str) -> str:
    if model != "embedded":
        return os.path.expanduser(model)
    from qratk.embedded import model_directory

    return str(model_directory())
