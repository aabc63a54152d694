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
    found = {g: find_layers(model, granularity=g) for g in ("block", "sublayer", "fused", "linear")}
    projections = {g: sorted(p for layer in layers for p in layer.projections) for g, layers in found.items()}
    assert all(names == projections["block"] for names in projections.values())
    assert all(len({layer.name for layer in layers}) == len(layers) for layers in found.values())
    assert len(found["sublayer"]) == 2 * len(found["block"])
    assert all(layer.projections == (layer.name,) for layer in found["linear"])


GATED = {
    "self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "self_attn.o_proj": ("o_proj",),
    "mlp.gate_up_proj": ("gate_proj", "up_proj"), "mlp.down_proj": ("down_proj",),
}  # fmt: skip
SERVED = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "gemma"), GATED),
    "phi": {
        "self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "self_attn.dense": ("dense",), "mlp.fc1": ("fc1",),
        "mlp.fc2": ("fc2",),
    },
    "gpt_neox": {
        "attention.query_key_value": ("query_key_value",), "attention.dense": ("dense",),
        "mlp.dense_h_to_4h": ("dense_h_to_4h",), "mlp.dense_4h_to_h": ("dense_4h_to_h",),
    },
    "opt": {
        "self_attn.qkv_proj": ("k_proj", "v_proj", "q_proj"), "self_attn.out_proj": ("out_proj",), "fc1": ("fc1",),
        "fc2": ("fc2",),
    },
    "gpt2": {
        "attn.c_attn": ("c_attn",), "attn.c_proj": ("c_proj",), "mlp.c_fc": ("c_fc",), "mlp.c_proj": ("c_proj",),
    },
}  # fmt: skip
"""By family: layers of a block at granularity "fused", and the last parts of the names of their projections."""


@pytest.mark.parametrize("family", sorted(BLOCKS))
def test_fused_layers_are_what_servers_multiply_by_at_once(family, tiny_model):
    path = BLOCKS[family][0]
    layers = find_layers(tiny_model(family), granularity="fused")
    found = {n.name.removeprefix(f"{path}."): tuple(p.rpartition(".")[2] for p in n.projections) for n in layers}
    assert found == {f"{i}.{name}": parts for i in range(3) for name, parts in SERVED[family].items()}


def test_the_first_projections_of_latent_attention_are_joined():
    import torch
    from transformers import AutoModelForCausalLM, DeepseekV3Config

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            DeepseekV3Config(
                vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=1, first_k_dense_replace=1,
                num_attention_heads=4, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16,
            )
        )  # fmt: skip
    own = {n.name.removeprefix("model.layers.0."): len(n.projections) for n in find_layers(model, granularity="fused")}
    assert own == {
        "self_attn.fused_qkv_a_proj": 2, "self_attn.q_b_proj": 1, "self_attn.kv_b_proj": 1, "self_attn.o_proj": 1,
        "mlp.gate_up_proj": 2, "mlp.down_proj": 1,
    }  # fmt: skip


def test_a_joined_projection_that_is_alone_keeps_its_own_name(tiny_model):
    layers = find_layers(tiny_model("llama"), granularity="fused", target_modules=["q_proj", "gate_proj", "up_proj"])
    assert [layer.name.removeprefix("model.layers.") for layer in layers[:2]] == [
        "0.self_attn.q_proj",
        "0.mlp.gate_up_proj",
    ]


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


def test_all_experts_of_a_mixture_are_one_fused_layer():
    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1, self.w2, self.w3 = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 8)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(4, 2)
            self.experts = nn.ModuleList(Expert() for _ in range(2))
            self.shared_expert = Expert()

    model = nn.Module()
    model.layers = nn.ModuleList(Block() for _ in range(2))
    layers = find_layers(model, granularity="fused")
    assert [(layer.name, len(layer.projections)) for layer in layers[:4]] == [
        ("layers.0.gate", 1),
        ("layers.0.experts", 6),
        ("layers.0.shared_expert.w13", 2),
        ("layers.0.shared_expert.w2", 1),
    ]
