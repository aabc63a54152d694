"""compressed-tensors: the very codes, read back by another reader than the one that packs, and by the library."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch
from exported import MIXED, mixed_backbone

from qratk.adapters.base import adapters
from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError, QuantizationError, UnsupportedModelError
from qratk.exporters._compressed_reader import read_compressed
from qratk.exporters.base import EXACT
from qratk.exporters.compressed_tensors import CompressedTensorsExporter, Scheme
from qratk.exporters.selfcheck import self_check
from qratk.quantizers.base import quantizers


def table(name="affine", **options):
    return {bits: quantizers.create(name, **{"group_size": 32, **options}) for bits in (2, 3, 4, 8)}


def mixed(tiny_backbone, family="llama", **options):
    return mixed_backbone(tiny_backbone, family, **{"quantizers": table(), **options})


@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"metadata_dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma", "mistral"])
def test_weights_are_those_of_the_bank_to_the_bit(family, options, tiny_backbone, tmp_path):
    backbone = mixed(tiny_backbone, family, quantizers=table(**options))
    folder = CompressedTensorsExporter().export(backbone, tmp_path / "out")
    read = read_compressed(folder)
    dtype = torch.bfloat16 if "metadata_dtype" in options else torch.float16
    for name, bank in backbone.banks.items():
        expected = bank.dequantized(bank.active)
        expected = expected if bank.active < 16 else expected.to(dtype).float()
        assert torch.equal(read[f"{name}.weight"]().float(), expected), name
    assert {name: read[name]().dtype for name in backbone.fixed_tensors()} == dict.fromkeys(
        backbone.fixed_tensors(), dtype
    )


def test_calibrated_codes_of_gptq_go_out_as_well(tiny_backbone, tmp_path):
    backbone = tiny_backbone(quantizers=table("gptq"), layers=5)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 96, (4, 16), generator=generator)
    backbone.calibrate([{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    backbone.build_bank([2, 3, 4, 8])
    backbone.activate(MIXED, seed=0)
    folder = CompressedTensorsExporter("transformers").export(backbone, tmp_path / "out")
    read = read_compressed(folder)
    for name, bank in backbone.banks.items():
        if bank.active < 16:
            assert torch.equal(read[f"{name}.weight"](), bank.dequantized(bank.active))


def test_groups_of_the_configuration_name_each_projection_once(tiny_backbone, tmp_path):
    backbone = mixed(tiny_backbone)
    folder = CompressedTensorsExporter().export(backbone, tmp_path / "out")
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    found = {group["weights"]["num_bits"]: set(group["targets"]) for group in settings["config_groups"].values()}
    expected = {
        bits: {n for layer in layers for n, _ in backbone.layers[layer].modules}
        for bits, layers in {2: [0], 4: [1, 2], 8: [3]}.items()
    }
    assert found == expected
    assert all(group["format"] == "pack-quantized" for group in settings["config_groups"].values())


def test_vllm_cpu_gets_4_bits_and_16_alone_with_the_same_weights(tiny_backbone, tmp_path):
    backbone = mixed(tiny_backbone)
    exporter = CompressedTensorsExporter("vllm-cpu", pad=True)
    folder = exporter.export(backbone, tmp_path / "out")
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert [group["weights"]["num_bits"] for group in settings["config_groups"].values()] == [4]
    read = read_compressed(folder)
    for name, bank in backbone.banks.items():
        expected = bank.dequantized(bank.active)
        assert torch.equal(read[f"{name}.weight"]().float(), expected if bank.active <= 4 else expected.half().float())
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["rank_pattern"] == {}
    assert self_check(exporter, backbone, folder).passed


def test_self_check_is_of_exact_weights_where_nothing_is_rounded(tiny_backbone, tmp_path):
    backbone = mixed(tiny_backbone, quantizers=table(metadata_dtype="bfloat16"))  # the model's weights are bfloat16
    exporter = CompressedTensorsExporter()
    found = self_check(exporter, backbone, exporter.export(backbone, tmp_path / "out"))
    assert found.tolerance == EXACT
    assert found.passed


@pytest.mark.parametrize("name", ["hqq", "nf4", "awq", "int8"])
def test_other_quantisers_are_refused_with_the_cure(name, tiny_backbone, tmp_path):
    bits = {"hqq": 2, "nf4": 4, "awq": 4, "int8": 8}[name]
    backbone = tiny_backbone(quantizers={bits: quantizers.create(name)}, bits=(bits,) if name != "awq" else ())
    if name == "awq":
        ids = torch.ones(2, 8, dtype=torch.int64)
        backbone.calibrate([{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
        backbone.build_bank([bits])
    backbone.activate(Configuration.uniform(bits, 0, 3), seed=0)
    with pytest.raises(QuantizationError, match=f"{name} at {bits} bits has no 16-bit scales.*portable.*dense"):
        CompressedTensorsExporter().export(backbone, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_dense_bits_writes_what_cannot_be_packed_in_16(tiny_backbone, tmp_path):
    mixture = {4: quantizers.create("affine", group_size=32), 8: quantizers.create("int8")}
    backbone = mixed(
        tiny_backbone, quantizers=mixture, bits=(4, 8), layers=2, configuration=Configuration.of([4, 8], [2, 2])
    )
    with pytest.raises(QuantizationError, match="--dense-bits 8"):
        CompressedTensorsExporter().export(backbone, tmp_path / "out")
    exporter = CompressedTensorsExporter(dense_bits=8)
    assert self_check(exporter, backbone, exporter.export(backbone, tmp_path / "out")).passed


def test_projections_that_vllm_multiplies_at_once_must_be_packed_alike(tiny_backbone, tmp_path):
    backbone = tiny_backbone(quantizers=table(), bits=(2, 4), granularity="linear", layers=1)
    bits = [2 if "k_proj" in layer.name else 4 for layer in backbone.layers]
    backbone.activate(Configuration.of(bits, [0] * len(bits)), seed=0)
    with pytest.raises(QuantizationError, match=r"q_proj and .*k_proj are packed in different ways.*granularity"):
        CompressedTensorsExporter().export(backbone, tmp_path / "out")
    CompressedTensorsExporter("transformers").export(backbone, tmp_path / "alone")
    CompressedTensorsExporter("vllm-cpu").export(backbone, tmp_path / "container")


def test_what_the_form_cannot_hold_is_said(tiny_backbone, tmp_path):
    kinds = {4: quantizers.create("affine", group_size=32), 8: quantizers.create("affine", metadata_dtype="bfloat16")}
    two = tiny_backbone(quantizers=kinds, bits=(4, 8), layers=2)
    two.activate(Configuration.of([4, 8], [0, 0]), seed=0)
    with pytest.raises(QuantizationError, match=r"scales are of two types, float16 .* and bfloat16"):
        CompressedTensorsExporter().export(two, tmp_path / "out")
    dense = tiny_backbone(bits=(16,))
    dense.activate(Configuration.uniform(16, 0, 3), seed=0)
    with pytest.raises(QuantizationError, match="every layer would be written in 16 bits"):
        CompressedTensorsExporter().export(dense, tmp_path / "out")
    dora = mixed(tiny_backbone, method=adapters.create("dora"))
    with pytest.raises(ConfigurationError, match="no DoRA"):
        CompressedTensorsExporter().export(dora, tmp_path / "out")
    odd = tiny_backbone(quantizers={4: quantizers.create("affine", group_size=16)}, bits=(4,), intermediate=48)
    odd.activate(Configuration.uniform(4, 0, 3), seed=0)
    with pytest.raises(QuantizationError, match="sides that divide by 32"):
        CompressedTensorsExporter("vllm-cpu").export(odd, tmp_path / "out")
    turned = tiny_backbone("gpt2", quantizers=table(), bits=(4,))
    turned.activate(Configuration.uniform(4, 0, 3), seed=0)
    with pytest.raises(UnsupportedModelError, match=r"is a Conv1D.*gptq"):
        CompressedTensorsExporter().export(turned, tmp_path / "out")
    with pytest.raises(ConfigurationError, match="client must be one of"):
        CompressedTensorsExporter("ollama")


def test_scheme_orders_by_bits():
    assert sorted([Scheme(8, 32, False), Scheme(2, 64, True)])[0].bits == 2


def test_transformers_with_the_library_gives_our_logits(tiny_backbone, tiny_batch, tmp_path):
    try:
        installed = version("compressed-tensors")
    except PackageNotFoundError:
        pytest.skip("compressed-tensors is not installed")
    if not installed.startswith("0.17."):
        pytest.skip(f"compressed-tensors {installed} reads zero points in another way than 0.17")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    backbone = mixed(tiny_backbone)
    folder = CompressedTensorsExporter().export(backbone, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad(), backbone.stored_precision():
        model(**tiny_batch)  # unpacks, which PEFT needs
        theirs = PeftModel.from_pretrained(model, folder / "adapter").eval()(**tiny_batch).logits
        torch.testing.assert_close(theirs, backbone.model(**tiny_batch).logits, rtol=0, atol=1e-5)
