"""What a client cannot serve is refused before anything is loaded, with what to do; what it can is not."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qratk.backbone.backbone import Backbone
from qratk.core.errors import ConfigurationError
from qratk.exporters.base import Exporter, exporters
from qratk.loop.serving import clients, require_served
from qratk.settings.recipe import autoqra
from qratk.testing import ToyEvaluator
from qratk.training.building import built_quantizers
from qratk.training.options import FineTuneOptions

BITS = (2, 3, 4, 8)
SYMMETRIC = {"class_path": "affine", "init_args": {"symmetric": True}}


@pytest.fixture
def module(tiny_model: Callable[..., Any]) -> Callable[..., Any]:
    """A module of options whose model, on the meta device, is tiny; None for a model that must not be asked for."""
    from qratk import FineTuneModule

    def make(family: str | None = "llama", *, hidden: int = 64, **options: Any) -> Any:
        given = FineTuneModule("tiny", **{"granularity": "fused", "quantizers": "portable", **options}).options

        def load_backbone(*, weights: bool) -> Backbone:
            assert not weights
            assert family is not None, "settings alone were to be enough"
            with torch.device("meta"):
                model = tiny_model(family, layers=1, hidden=hidden, intermediate=2 * hidden)
            return Backbone.from_model(
                model, quantizers=built_quantizers(given.quantizers), granularity=given.granularity, bank_dir=None
            )

        assert isinstance(given, FineTuneOptions)
        return SimpleNamespace(options=given, load_backbone=load_backbone)

    return make


def test_forms_name_their_clients() -> None:
    known = clients()
    assert {"vllm", "vllm-cpu", "transformers", "llama.cpp", "ollama", "mlx"} <= known.keys()
    assert known["llama.cpp"] == known["ollama"] == ("gguf",)
    assert known["transformers"] == ("bitsandbytes", "compressed-tensors")


def test_every_form_with_clients_is_made_for_them_and_answers_for_itself() -> None:
    for form in exporters.names():
        cls = exporters.get(form)
        assert not cls.clients or cls.serving is not Exporter.serving, form
        for options in cls.clients.values():
            exporters.create(form, **options)


@pytest.mark.parametrize("client", ["vllm", "vllm-cpu", "transformers", "llama.cpp", "mlx"])
@pytest.mark.parametrize("quantizers", ["portable", "portable_gptq"])
def test_portable_sets_are_served_by_all_at_every_bit_width(client: str, quantizers: str, module: Any) -> None:
    require_served(client, module(quantizers=quantizers), (*BITS, 16))


def test_a_person_is_told_which_bits_take_more_bytes(module: Any) -> None:
    assert require_served("vllm-cpu", module(), (3, 4, 8)) == (
        "for vllm-cpu: 3-bit codes take 4 bits",
        "for vllm-cpu: 8-bit layers are written in 16 bits",
    )
    assert require_served("llama.cpp", module(), (4, 8)) == ()


BFLOAT16 = {"class_path": "affine", "init_args": {"metadata_dtype": "bfloat16"}}
GROUPS_OF_16 = {"class_path": "affine", "init_args": {"group_size": 16}}
AFFINE = dict.fromkeys(BITS, "affine")
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "vllm: linear": ("vllm", {"granularity": "linear"}, r"q, k and v.*give fused, sublayer or block"),
    "vllm: hqq": (
        "vllm",
        {"quantizers": {**AFFINE, 2: "hqq"}},
        r"2 bits by hqq has no 16-bit scales with whole zero points.*give model\.quantizers: portable",
    ),
    "vllm-cpu: nf4": ("vllm-cpu", {"quantizers": {**AFFINE, 4: "nf4"}}, "4 bits by nf4 has no 16-bit scales"),
    "vllm: int8": ("vllm", {"quantizers": {**AFFINE, 8: "int8"}}, "8 bits by int8 has no 16-bit scales"),
    "vllm: groups": (
        "vllm",
        {"quantizers": {**AFFINE, 2: GROUPS_OF_16}},
        "2 bits by affine has groups of 16 weights, and vllm takes 32, 64, 128",
    ),
    "transformers: scales": (
        "transformers",
        {"quantizers": {**AFFINE, 4: BFLOAT16}},
        r"several types \(bfloat16, float16\).*same metadata_dtype",
    ),
    "llama.cpp: 8 bits": ("llama.cpp", {"quantizers": AFFINE}, "8 bits by affine .*Q8_0 does not hold"),
    "llama.cpp: nf4": (
        "llama.cpp",
        {"quantizers": {**AFFINE, 4: "nf4", 8: SYMMETRIC}},
        "4 bits by nf4 has no scales and zero points",
    ),
    "llama.cpp: groups": (
        "llama.cpp",
        {"quantizers": {**AFFINE, 4: GROUPS_OF_16, 8: SYMMETRIC}},
        "4 bits by affine has groups of 16 weights, no whole number",
    ),
    "mlx: nf4": ("mlx", {"quantizers": {**AFFINE, 4: "nf4"}}, "4 bits by nf4 has no scales and zero points"),
    "mlx: groups": ("mlx", {"quantizers": {**AFFINE, 4: GROUPS_OF_16}}, "groups of 16 weights, and mlx takes 32, 64"),
    "transformers: no form": (
        "transformers",
        {"quantizers": {**AFFINE, 4: "nf4"}},
        r"as bitsandbytes: 2 bits by affine is no code(?s:.*)as compressed-tensors: 4 bits by nf4",
    ),
    "dora": ("llama.cpp", {"adapter": "dora"}, "takes LoRA beside packed weights, and model.adapter is dora"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_cannot_be_served_are_refused_without_a_model(name: str, module: Any) -> None:
    client, options, message = REFUSED[name]
    with pytest.raises(ConfigurationError, match=rf"search\.for: {client} could not serve(?s:.*){message}"):
        require_served(client, module(None, **options), BITS)


def test_only_bits_on_the_ladder_are_asked_of(module: Any) -> None:
    require_served("vllm", module(quantizers={4: "affine"}), (4,))
    require_served("llama.cpp", module(quantizers=dict.fromkeys(BITS, "affine")), (2, 4))
    with pytest.raises(ConfigurationError, match=r"no quantisers of \[5\] bits"):
        require_served("vllm", module(None), (4, 5))


def test_transformers_takes_projections_one_by_one(module: Any) -> None:
    require_served("transformers", module(granularity="linear"), BITS)


def test_one_form_of_several_is_enough(module: Any) -> None:
    default = module(granularity="linear", quantizers="default")
    require_served("transformers", default, (4, 16))
    with pytest.raises(ConfigurationError, match=r"all packed layers of one kind.*search\.bits: \[4, 16\]"):
        require_served("transformers", default, (4, 8))


def test_mlx_names_weights_of_some_families(module: Any) -> None:
    with pytest.raises(ConfigurationError, match="mlx-lm names weights of the family 'gpt2' is not known"):
        require_served("mlx", module("gpt2"), (4,))


def test_a_family_without_a_layout_and_shapes_without_groups_are_refused_by_the_model(module: Any) -> None:
    with pytest.raises(
        ConfigurationError, match=r"as gguf: no layout of llama\.cpp is known here for the family 'gpt2'"
    ):
        require_served("llama.cpp", module("gpt2"), (4,))
    with pytest.raises(ConfigurationError, match=r"is a Conv1D, and compressed-tensors packs"):
        require_served("vllm", module("gpt2"), (4,))
    # Rows of 80 divide into groups of 16 at best.
    with pytest.raises(ConfigurationError, match=r"4 bits by affine \(model.layers.0.*groups of 16 weights"):
        require_served("vllm", module(hidden=80), (4,))


def test_a_search_names_a_client_that_there_is() -> None:
    toy = {"evaluator": ToyEvaluator(num_layers=2), "like": (4, 4)}
    assert autoqra(**toy).client is None
    assert autoqra(**toy, **{"for": "vllm"}).client == autoqra(**toy, client="vllm").client == "vllm"
    with pytest.raises(ConfigurationError, match=r"must be one of .*llama\.cpp.*got 'vlm'. Did you mean 'vllm'"):
        autoqra(**toy, client="vlm")
