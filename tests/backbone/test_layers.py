"""Blocks and projections are found in every family, at every granularity."""

from __future__ import annotations

import pytest
from torch import nn

from qratk.backbone.layers import find_blocks, find_layers
from qratk.core.errors import ConfigurationError, UnsupportedModelError

BLOCKS = {
    "llama": ("model.layers", 7), "qwen2": ("model.layers", 7), "qwen3": ("model.layers", 7),
    "mistral": ("model.layers", 7), "gemma": ("model.layers", 7), "phi": ("model.layers", 6),
    "gpt_neox": ("gpt_neox.layers", 4), "opt": ("model.decoder.layers", 6), "gpt2": ("transformer.h", 4),
}  # fmt: skip


@pytest.mark.parametrize("family", sorted(BLOCKS))
def test_blocks_and_projections_are_those_of_the_family(family, tiny_model):
    model = tiny_model(family)
    path, projections = BLOCKS[family]
    assert find_blocks(model)[0] == path
    layers = find_layers(model)
    assert [layer.name for layer in layers] == [f"{path}.{i}" for i in range(3)]
    assert {len(layer.projections) for layer in layers} == {projections}


@pytest.mark.parametrize("family", sorted(BLOCKS))
def test_granularities_divide_the_same_projections(family, tiny_model):
    model = tiny_model(family)
    found = {g: find_layers(model, granularity=g) for g in ("block", "sublayer", "linear")}
    projections = {g: [p for layer in layers for p in layer.projections] for g, layers in found.items()}
    assert sorted(projections["block"]) == sorted(projections["sublayer"]) == sorted(projections["linear"])
    assert len(found["sublayer"]) == 2 * len(found["block"])
    assert all(layer.projections == (layer.name,) for layer in found["linear"])
    assert len({layer.name for layer in found["sublayer"]}) == len(found["sublayer"])


def test_projections_directly_in_a_block_form_its_feed_forward(tiny_model):
    layers = find_layers(tiny_model("opt"), granularity="sublayer")
    assert layers[1].name == "model.decoder.layers.0.feed_forward"
    assert layers[1].projections == ("model.decoder.layers.0.fc1", "model.decoder.layers.0.fc2")


def test_target_modules_select_by_the_end_of_the_name(tiny_model):
    layers = find_layers(tiny_model("llama"), target_modules=["q_proj", "mlp.down_proj"])
    assert layers[0].projections == ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj")


def test_a_target_that_matches_nothing_is_an_error_with_the_known_names(tiny_model):
    with pytest.raises(ConfigurationError, match=r"'w_query' matches no projection.*q_proj"):
        find_layers(tiny_model("llama"), target_modules=["q_proj", "w_query"])
    with pytest.raises(ConfigurationError, match="'roj' matches no"):  # a tail of a word is no name
        find_layers(tiny_model("llama"), target_modules="roj")
    with pytest.raises(ConfigurationError, match="empty"):
        find_layers(tiny_model("llama"), target_modules=[])


def test_an_unknown_granularity_is_an_error(tiny_model):
    with pytest.raises(ConfigurationError, match="granularity"):
        find_layers(tiny_model("llama"), granularity="head")


def test_a_model_without_blocks_is_unsupported_and_says_what_was_looked_for():
    with pytest.raises(UnsupportedModelError, match=r"ModuleList.*nn\.Linear"):
        find_blocks(nn.Sequential(nn.Linear(2, 2)))


def test_experts_inside_blocks_are_not_taken_for_blocks():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(8))

    model = nn.Module()
    model.layers = nn.ModuleList(Block() for _ in range(2))
    name, blocks = find_blocks(model)
    assert (name, len(blocks)) == ("layers", 2)
