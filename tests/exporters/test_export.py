"""Exports carry the same codes: logits are equal to the bit."""

from __future__ import annotations

import json

import pytest
import torch

from qratk.adapters.base import adapters
from qratk.adapters.lora import Lora
from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError, QuantizationError
from qratk.core.space import SearchSpace
from qratk.exporters.dense import DenseExporter, merged_model
from qratk.exporters.native import native_model
from qratk.exporters.packed import PackedExporter, load_quantized, save_quantized, stored_bytes
from qratk.exporters.selfcheck import self_check
from qratk.peaks.foretold import memory_model
from qratk.quantizers.base import quantizers

MIXED = Configuration.of([16, 8, 4, 3, 2], [2, 4, 8, 16, 0])


def mixed_backbone(tiny_backbone, family, **options):
    """Backbone at mixed bits and ranks, with adapters that do something."""
    backbone = tiny_backbone(family, layers=5, bits=(2, 3, 4, 8, 16), **options)
    backbone.activate(MIXED, seed=3)
    generator = torch.Generator().manual_seed(0)
    state = {n: 0.2 * torch.randn(t.shape, generator=generator) for n, t in backbone.adapter_state().items()}
    backbone.load_adapter_state(state)
    return backbone


def stored_logits(backbone, batch):
    with torch.no_grad(), backbone.stored_precision():
        return backbone.model(**batch).logits


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_saved_adapter_over_native_layers_gives_the_same_logits_to_the_bit(family, tiny_backbone, tiny_batch, tmp_path):
    from peft import PeftModel

    backbone = mixed_backbone(tiny_backbone, family)
    backbone.save_adapter(tmp_path, MIXED)
    native = PeftModel.from_pretrained(native_model(backbone, MIXED), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(native(**tiny_batch).logits, stored_logits(backbone, tiny_batch))


@pytest.mark.usefixtures("processor")
def test_original_int8_layers_quantise_activations_and_only_agree_roughly(tiny_backbone, tiny_batch):
    backbone = tiny_backbone(bits=(8,))
    configuration = Configuration.uniform(8, 0, 3)
    backbone.activate(configuration, seed=0)
    ours, exact, original = (
        stored_logits(backbone, tiny_batch),
        native_model(backbone, configuration),
        native_model(backbone, configuration, int8_activations=True),
    )
    with torch.no_grad():
        assert torch.equal(exact(**tiny_batch).logits, ours)
        rough = original(**tiny_batch).logits
        assert not torch.equal(rough, ours)
        assert float((rough - ours).norm() / ours.norm()) < 0.05
        # In training mode on CPU bitsandbytes multiplies by the dequantised weight, as we do.
        assert torch.equal(original.train()(**tiny_batch).logits, ours)


@pytest.mark.usefixtures("processor")
def test_native_layers_are_copies_that_leave_the_bank_alone(tiny_backbone, tiny_batch):
    backbone = mixed_backbone(tiny_backbone, "llama")
    expected = stored_logits(backbone, tiny_batch)
    native = native_model(backbone, MIXED)
    with torch.no_grad():
        for parameter in native.parameters():
            parameter.zero_()
    assert torch.equal(stored_logits(backbone, tiny_batch), expected)


@pytest.mark.usefixtures("processor")
def test_fallbacks_and_plain_statistics_survive_every_export(tiny_backbone, tiny_batch, tmp_path):
    from peft import PeftModel

    table = {2: quantizers.create("hqq"), 4: quantizers.create("nf4", double_quantization=False)}
    backbone = tiny_backbone(bits=(2, 4), hidden=40, intermediate=27, quantizers=table)
    assert backbone.fallbacks
    configuration = Configuration.of([2, 4, 2], [4, 4, 8])
    backbone.activate(configuration, seed=0)
    expected = stored_logits(backbone, tiny_batch)
    backbone.save_adapter(tmp_path / "adapter", configuration)
    save_quantized(backbone, configuration, tmp_path / "base")
    native = PeftModel.from_pretrained(native_model(backbone, configuration), tmp_path / "adapter").eval()
    loaded = PeftModel.from_pretrained(
        native_model(load_quantized(tmp_path / "base"), configuration), tmp_path / "adapter"
    ).eval()
    with torch.no_grad():
        assert torch.equal(native(**tiny_batch).logits, expected)
        assert torch.equal(loaded(**tiny_batch).logits, expected)


def test_native_4_bit_layers_multiply_as_the_bank_does_in_every_mode_and_keep_their_bytes(
    processor, tiny_backbone, tiny_batch
):
    backbone = tiny_backbone(bits=(4,))
    configuration = Configuration.uniform(4, 0, 3)
    backbone.activate(configuration, seed=0)
    ours, native = stored_logits(backbone, tiny_batch), native_model(backbone, configuration)
    before = {name: tensor.clone() for name, tensor in native.state_dict().items()}
    with torch.no_grad():
        for mode in (True, False, True):
            assert torch.equal(native.train(mode)(**tiny_batch).logits, ours)
    after = native.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def original_4_bit_layer(rows, columns):
    """A layer of bitsandbytes' own, and the weight that it dequantises to."""
    import bitsandbytes as bnb

    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(2))
    layer = bnb.nn.Linear4bit(columns, rows, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to("cpu")
    return layer.eval(), bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def test_original_4_bit_layers_round_to_bfloat16_where_the_processor_can(processor):
    (layer, weight), x = original_4_bit_layer(64, 128), torch.randn(3, 128, generator=torch.Generator().manual_seed(1))
    expected = torch.nn.functional.linear(x, weight)
    with torch.no_grad():
        error = float((layer(x) - expected).norm() / expected.norm())
    assert error == 0 if processor == "plain" else 1e-4 < error < 1e-2


def test_original_4_bit_layers_take_no_odd_number_of_outputs_where_the_processor_can(processor):
    layer, _ = original_4_bit_layer(27, 128)
    if processor == "plain":
        assert layer(torch.ones(1, 128)).shape == (1, 27)
    else:
        with pytest.raises(AssertionError, match="N must be divisible"):
            layer(torch.ones(1, 128))


def test_a_quantizer_without_a_native_layer_is_refused_with_the_alternatives(tiny_backbone):
    class Doubled(type(quantizers.create("int8"))):
        """A third party's quantizer, of a layout that no library has."""

        def native_layer(self, layer):
            return None

    backbone = tiny_backbone(quantizers={8: Doubled()})
    backbone.build_bank([8])
    with pytest.raises(QuantizationError, match="no native layer"):
        native_model(backbone, Configuration.uniform(8, 0, 3))


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_reloaded_quantised_model_gives_the_same_logits_to_the_bit(family, tiny_backbone, tiny_batch, tmp_path):
    backbone = mixed_backbone(tiny_backbone, family)
    save_quantized(backbone, MIXED, tmp_path)
    again = load_quantized(tmp_path)
    again.activate(MIXED, seed=0)
    again.load_adapter_state(backbone.adapter_state())
    assert torch.equal(stored_logits(again, tiny_batch), stored_logits(backbone, tiny_batch))
    assert again.digest() == backbone.digest()


@pytest.mark.parametrize("name", ["dora", "adalora"])
def test_reloaded_model_has_the_adapter_method_that_was_saved(name, tiny_backbone, tiny_batch, tmp_path):
    options = {"init_rank_factor": 2.0} if name == "adalora" else {}
    backbone = mixed_backbone(tiny_backbone, "llama", method=adapters.create(name, **options))
    save_quantized(backbone, MIXED, tmp_path)
    again = load_quantized(tmp_path)
    assert again.adapters.method == backbone.adapters.method
    again.activate(MIXED, seed=0)
    again.load_adapter_state(backbone.adapter_state())
    assert torch.equal(stored_logits(again, tiny_batch), stored_logits(backbone, tiny_batch))


def test_folder_that_names_no_adapter_method_is_of_plain_lora(tiny_backbone, tmp_path):
    save_quantized(mixed_backbone(tiny_backbone, "llama"), MIXED, tmp_path)
    description = json.loads((tmp_path / "quantized.json").read_text())
    del description["method"]
    (tmp_path / "quantized.json").write_text(json.dumps(description))
    (tmp_path / "SHA256SUMS").unlink()
    assert load_quantized(tmp_path).adapters.method == Lora()


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_stored_bytes_are_the_predicted_storage_less_the_adapters(family, tiny_backbone, tmp_path):
    backbone = mixed_backbone(tiny_backbone, family)
    save_quantized(backbone, MIXED, tmp_path)
    space = SearchSpace((2, 3, 4, 8, 16), (0, 2, 4, 8, 16), tuple(s.name for s in backbone.shapes))
    footprint = memory_model(backbone, space, trace=False).footprint(MIXED)
    assert stored_bytes(tmp_path) == footprint.storage_bytes - footprint.adapters


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merged_dense_model_agrees_to_rounding(family, tiny_backbone, tiny_batch):
    backbone = mixed_backbone(tiny_backbone, family)
    with torch.no_grad():
        merged = merged_model(backbone)(**tiny_batch).logits
    torch.testing.assert_close(merged, stored_logits(backbone, tiny_batch), rtol=1e-4, atol=1e-4)


def test_dense_weights_are_float16_unless_something_overflows_in_it(tiny_backbone, tmp_path):
    backbone = mixed_backbone(tiny_backbone, "llama")
    exporter = DenseExporter()
    folder = exporter.export(backbone, tmp_path / "plain")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float16"
    found = self_check(exporter, backbone, folder)
    rough = self_check(
        DenseExporter("bfloat16"), backbone, DenseExporter("bfloat16").export(backbone, tmp_path / "rough")
    )
    assert 0 < 10 * found.divergence < rough.divergence
    norm = backbone.base.model.layers[1].input_layernorm
    for factor, kind in ((1e5, "bfloat16"), (3e4, "bfloat16"), (1.0, "float16")):  # weights, outputs, neither
        with torch.no_grad():
            kept = norm.weight.clone()
            norm.weight.mul_(factor)
            assert exporter.chosen(backbone) == "float16", "of what was written"
            assert DenseExporter().chosen(backbone) == kind
            norm.weight.copy_(kept)


def test_every_export_ends_an_answer_where_the_original_does(tiny_backbone, tmp_path):
    from transformers import AutoModelForCausalLM

    backbone = tiny_backbone(bits=(4,))
    configuration = Configuration.uniform(4, 0, 3)
    backbone.activate(configuration, seed=0)
    backbone.base.generation_config.eos_token_id = [5, 7]  # of a chat model: its config.json names one of them
    DenseExporter().export(backbone, tmp_path / "dense")
    PackedExporter().export(backbone, tmp_path / "packed")
    exported = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense"),
        load_quantized(tmp_path / "packed").base,
        native_model(backbone, configuration),
    )
    assert [model.generation_config.eos_token_id for model in exported] == [[5, 7]] * 3


def test_a_directory_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"quantized\.json"):
        load_quantized(tmp_path)
    (tmp_path / "quantized.json").write_text('{"format": "other"}')
    with pytest.raises(ConfigurationError, match="expected format"):
        load_quantized(tmp_path)
