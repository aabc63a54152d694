"""Adapters: nested seeded initialisation, switching, rounding, files."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from qratk.adapters.matrices.drawing import initial_a
from qratk.adapters.matrices.layers import anchored, check_patterns
from qratk.adapters.options import AdapterOptions
from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError, QuantizationError


def randomised(backbone, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    state = {n: torch.randn(t.shape, generator=generator) for n, t in backbone.adapter_state().items()}
    backbone.load_adapter_state(state)
    return state


def test_initial_matrix_is_nested_in_rank_and_differs_by_seed_and_module():
    sixteen = initial_a("a.b", 16, 37, seed=5)
    for rank in (1, 3, 8):
        assert torch.equal(initial_a("a.b", rank, 37, seed=5), sixteen[:rank])
    assert not torch.equal(initial_a("a.b", 16, 37, seed=6), sixteen)
    assert not torch.equal(initial_a("a.c", 16, 37, seed=5), sixteen)


def test_initial_matrix_is_distributed_as_pefts():
    matrix, bound = initial_a("x", 64, 400, seed=0), 1 / math.sqrt(400)
    reference = torch.nn.init.kaiming_uniform_(
        torch.empty(64, 400), a=math.sqrt(5), generator=torch.Generator().manual_seed(0)
    )
    assert float(matrix.abs().max()) <= bound
    assert float(matrix.std()) == pytest.approx(float(reference.std()), rel=0.02)
    assert abs(float(matrix.mean())) < 0.02 * bound


def test_activation_gives_fresh_adapters_with_zero_output(tiny_backbone, tiny_batch):
    backbone = tiny_backbone(bits=(4,))
    with torch.no_grad():
        backbone.activate(Configuration.uniform(4, 0, 3), seed=0)
        without = backbone.model(**tiny_batch).logits
        backbone.activate(Configuration.uniform(4, 8, 3), seed=0)
        assert torch.equal(backbone.model(**tiny_batch).logits, without)


def test_switching_there_and_back_restores_the_output_to_the_bit(tiny_backbone, tiny_batch):
    backbone = tiny_backbone(bits=(2, 4, 8))
    first, second = Configuration.of([2, 4, 8], [4, 0, 8]), Configuration.of([8, 2, 4], [0, 16, 4])
    with torch.no_grad():
        backbone.activate(first, seed=1)
        state = randomised(backbone)
        before = backbone.model(**tiny_batch).logits
        backbone.activate(second, seed=1)
        randomised(backbone, seed=9)
        assert not torch.equal(backbone.model(**tiny_batch).logits, before)
        backbone.activate(first, seed=1)
        backbone.load_adapter_state(state)
        assert torch.equal(backbone.model(**tiny_batch).logits, before)


def test_switching_draws_nothing_from_the_global_generator(tiny_backbone):
    backbone = tiny_backbone(bits=(4,))
    state = torch.get_rng_state()
    backbone.activate(Configuration.uniform(4, 8, 3), seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_only_adapters_are_trainable(tiny_backbone):
    backbone = tiny_backbone(bits=(4,))
    backbone.activate(Configuration.of([4, 4, 4], [4, 0, 8]), seed=1)
    expected = {id(p) for _, p in backbone.trainable_parameters()}
    assert {id(p) for p in backbone.model.parameters() if p.requires_grad} == expected
    assert len(expected) == 2 * 2 * 7
    assert all(p.dtype == torch.float32 for _, p in backbone.trainable_parameters())


def test_one_step_on_an_adapter_equals_plain_peft(tiny_model, tiny_backbone, tiny_batch):
    from peft import LoraConfig, get_peft_model

    backbone = tiny_backbone()
    backbone.activate(Configuration.uniform(16, 4, 3), seed=1)
    plain = get_peft_model(
        tiny_model(), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    matches = dict(plain.named_parameters())
    ours = backbone.trainable_parameters()
    with torch.no_grad():
        for name, parameter in ours:
            matches[f"base_model.model.{name.replace('.weight', '.default.weight')}"].copy_(parameter)
    for model in (backbone.model, plain):
        model.train()
        model(**tiny_batch, labels=tiny_batch["input_ids"]).loss.backward()
    for name, parameter in ours:
        other = matches[f"base_model.model.{name.replace('.weight', '.default.weight')}"]
        assert torch.equal(parameter.grad, other.grad), name


def test_gradient_checkpointing_gives_the_same_gradients(tiny_backbone, tiny_batch):
    gradients = []
    for checkpointing in (False, True):
        backbone = tiny_backbone(bits=(4,))
        backbone.activate(Configuration.uniform(4, 4, 3), seed=1)
        if checkpointing:
            backbone.enable_gradient_checkpointing()
        backbone.model.train()
        backbone.model(**tiny_batch, labels=tiny_batch["input_ids"], use_cache=False).loss.backward()
        gradients.append([p.grad for _, p in backbone.trainable_parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_stored_precision_rounds_and_gives_the_masters_back(tiny_backbone):
    backbone = tiny_backbone(bits=(4,))
    backbone.activate(Configuration.uniform(4, 4, 3), seed=1)
    masters = randomised(backbone)
    parameters = backbone.trainable_parameters()
    with backbone.stored_precision(), backbone.stored_precision():
        for name, parameter in parameters:
            assert torch.equal(parameter, masters[name].bfloat16().float())
    for name, parameter in backbone.trainable_parameters():
        assert torch.equal(parameter, masters[name])
    assert [id(p) for _, p in parameters] == [id(p) for _, p in backbone.trainable_parameters()]
    assert backbone.describe()["trained_in"] == "float32"
    assert backbone.describe()["stored_in"] == "bfloat16"


def test_saved_adapter_holds_the_stored_bytes_and_anchored_patterns(tiny_backbone, tmp_path):
    backbone = tiny_backbone(bits=(4,), layers=11)
    configuration = Configuration.of([4] * 11, [4, 8, 0, *[16] * 8])
    backbone.activate(configuration, seed=1)
    backbone.save_adapter(tmp_path, configuration)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    expected = sum(
        2 * shape.adapter_parameters(choice.rank)
        for shape, choice in zip(backbone.shapes, configuration.layers, strict=True)
    )
    assert sum(t.nbytes for t in tensors.values()) == expected
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["rank_pattern"][anchored("model.layers.1.mlp.up_proj")] == 8
    assert config["rank_pattern"][anchored("model.layers.10.mlp.up_proj")] == 16
    assert "model.layers.2.mlp.up_proj" not in config["target_modules"]


@pytest.mark.parametrize("rslora", [False, True])
def test_scaling_is_the_same_in_plain_peft(rslora, tiny_model, tiny_backbone, tiny_batch, tmp_path):
    from peft import PeftModel

    backbone = tiny_backbone(adapter=AdapterOptions(alpha_over_rank=3.0, rslora=rslora, alpha=5.0), layers=11)
    configuration = Configuration.of([16] * 11, [3, 5, 0, *[16] * 8])
    backbone.activate(configuration, seed=1)
    randomised(backbone)
    backbone.save_adapter(tmp_path, configuration)
    plain = PeftModel.from_pretrained(tiny_model(layers=11), tmp_path).eval()
    with torch.no_grad(), backbone.stored_precision():
        assert torch.equal(plain(**tiny_batch).logits, backbone.model(**tiny_batch).logits)


def test_a_pattern_that_matches_nothing_or_too_much_is_an_error():
    names = ["layers.1.q", "layers.11.q"]
    check_patterns({"layers.1.q": anchored("layers.1.q")}, names)
    with pytest.raises(ConfigurationError, match="matches no module"):
        check_patterns({"layers.7.q": anchored("layers.7.q")}, names)
    with pytest.raises(ConfigurationError, match="also matches"):
        check_patterns({"layers.1.q": r"layers\.1.*q"}, names)


def test_saving_without_any_adapter_or_under_another_configuration_is_an_error(tiny_backbone, tmp_path):
    backbone = tiny_backbone(bits=(4,))
    none = Configuration.uniform(4, 0, 3)
    backbone.activate(none, seed=0)
    with pytest.raises(ConfigurationError, match="no adapter"):
        backbone.save_adapter(tmp_path, none)
    with pytest.raises(ConfigurationError, match="active configuration"):
        backbone.save_adapter(tmp_path, Configuration.uniform(4, 8, 3))


def test_adapter_state_of_another_configuration_is_refused(tiny_backbone):
    backbone = tiny_backbone(bits=(4,))
    backbone.activate(Configuration.uniform(4, 4, 3), seed=0)
    state = backbone.adapter_state()
    backbone.activate(Configuration.uniform(4, 8, 3), seed=0)
    with pytest.raises(ConfigurationError, match="another configuration"):
        backbone.load_adapter_state(state)


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_merging_raises_and_does_not_lose_the_adapter_in_silence(bits, tiny_backbone):
    backbone = tiny_backbone(bits=(2, 4, 8))
    backbone.activate(Configuration.uniform(bits, 4, 3), seed=0)
    with pytest.raises(QuantizationError, match="would be lost"):
        backbone.model.merge_and_unload()


@pytest.mark.parametrize("options", [{"alpha_over_rank": 0.0}, {"dropout": 1.0}, {"dtype": "float32"}, {"alpha": -1.0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigurationError):
        AdapterOptions(**options)
