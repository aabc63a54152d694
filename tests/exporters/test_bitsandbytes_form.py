"""bitsandbytes' form: the very codes, read back by another reader than the library, and by transformers."""

from __future__ import annotations

import json

import pytest
import torch
from exported import mixed_backbone

from qratk.core.configuration import Configuration
from qratk.core.errors import QuantizationError
from qratk.exporters._bitsandbytes_reader import read_bitsandbytes
from qratk.exporters.base import EXACT
from qratk.exporters.bitsandbytes import BitsandbytesExporter
from qratk.exporters.selfcheck import self_check
from qratk.quantizers.base import quantizers

NF4 = Configuration.of([4, 16, 4], [2, 4, 0])


def four_bits(tiny_backbone, family="llama", configuration=NF4, **options):
    quantizer = quantizers.create("nf4", **options)
    return mixed_backbone(
        tiny_backbone, family, configuration=configuration, layers=3, bits=(4, 16), quantizers={4: quantizer}
    )


def eight_bits(tiny_backbone):
    return mixed_backbone(
        tiny_backbone,
        configuration=Configuration.of([8, 16, 8], [2, 4, 0]),
        layers=3,
        bits=(8, 16),
        quantizers={8: quantizers.create("int8")},
    )


def loaded(folder, *, adapter=True):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return PeftModel.from_pretrained(model, folder / "adapter").eval() if adapter else model


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {}), ("llama", {"double_quantization": False}), ("llama", {"block_size": 32}), ("gpt2", {})],
)
def test_weights_of_4_bits_are_those_of_the_bank(family, options, tiny_backbone, tmp_path):
    backbone = four_bits(tiny_backbone, family, **options)
    exporter = BitsandbytesExporter()
    folder = exporter.export(backbone, tmp_path / "out")
    read = read_bitsandbytes(folder)
    for name, bank in backbone.banks.items():
        expected = bank.dequantized(bank.active)
        found = read[f"{name}.weight"]().float()
        found = found.t() if bank.active == 16 and family == "gpt2" else found  # as the original has it
        torch.testing.assert_close(found, expected, rtol=3e-7, atol=0)
    found = self_check(exporter, backbone, folder)
    assert (found.passed, found.tolerance) == (True, EXACT)


@pytest.mark.usefixtures("processor")
def test_transformers_reads_4_bits_and_multiplies_by_them_in_training_mode_to_the_bit(
    tiny_backbone, tiny_batch, tmp_path
):
    backbone = four_bits(tiny_backbone)
    model = loaded(BitsandbytesExporter("float32").export(backbone, tmp_path / "out"))
    layers = model.get_base_model().model.layers
    kinds = [type(layers[index].mlp.up_proj.get_base_layer()).__name__ for index in (0, 1)]
    assert kinds == ["Linear4bit", "Linear"]
    assert type(layers[2].mlp.up_proj).__name__ == "Linear4bit"
    model.train()  # in eval mode a kernel for AVX512-BF16 takes over where the processor has it
    with torch.no_grad(), backbone.stored_precision():
        assert torch.equal(model(**tiny_batch).logits, backbone.model(**tiny_batch).logits)


def test_in_eval_mode_4_bits_are_exact_where_the_processor_lacks_bfloat16(
    processor, tiny_backbone, tiny_batch, tmp_path
):
    backbone = four_bits(tiny_backbone)
    model = loaded(BitsandbytesExporter("float32").export(backbone, tmp_path / "out"))
    with torch.no_grad(), backbone.stored_precision():
        ours, theirs = backbone.model(**tiny_batch).logits, model(**tiny_batch).logits
    if processor == "plain":
        assert torch.equal(theirs, ours)
    else:
        assert 1e-5 < float((theirs - ours).norm() / ours.norm()) < 2e-2


@pytest.mark.usefixtures("processor")
def test_transformers_reads_8_bits_whose_layers_quantise_activations(tiny_backbone, tiny_batch, tmp_path):
    backbone = eight_bits(tiny_backbone)
    exporter = BitsandbytesExporter("float32")
    folder = exporter.export(backbone, tmp_path / "out")
    assert self_check(exporter, backbone, folder).tolerance == EXACT
    model = loaded(folder)
    with torch.no_grad(), backbone.stored_precision():
        ours, theirs = backbone.model(**tiny_batch).logits, model(**tiny_batch).logits
        assert 1e-5 < float((theirs - ours).norm() / ours.norm()) < 2e-2
        torch.testing.assert_close(model.train()(**tiny_batch).logits, ours, rtol=1e-5, atol=1e-5)


def test_what_is_not_packed_is_named_and_keeps_its_16_bits(tiny_backbone, tmp_path):
    backbone = four_bits(tiny_backbone)
    folder = BitsandbytesExporter().export(backbone, tmp_path / "out")
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert set(settings["llm_int8_skip_modules"]) == {"lm_head", *(n for n, _ in backbone.layers[1].modules)}
    tensors = read_bitsandbytes(folder)
    assert tensors["model.embed_tokens.weight"]().dtype == torch.bfloat16  # float32 in memory, of a bfloat16 checkpoint
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert any("--dtype float32" in note for note in BitsandbytesExporter().notes(backbone))


def test_rows_without_whole_blocks_are_told(tiny_backbone, tmp_path):
    backbone = tiny_backbone(bits=(4,), hidden=40, intermediate=48)
    backbone.activate(Configuration.uniform(4, 0, 3), seed=0)
    exporter = BitsandbytesExporter()
    assert any("no whole number of blocks of 64" in note for note in exporter.notes(backbone))
    assert any("do not divide by 32" in note for note in exporter.notes(backbone))
    assert self_check(exporter, backbone, exporter.export(backbone, tmp_path / "out")).passed


def test_what_bitsandbytes_cannot_hold_is_said(tiny_backbone, tmp_path):
    def refused(match, backbone):
        with pytest.raises(QuantizationError, match=match):
            BitsandbytesExporter().export(backbone, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    both = mixed_backbone(tiny_backbone, configuration=Configuration.of([4, 8], [2, 2]), bits=(4, 8), layers=2)
    refused("one kind; give --dense-bits 8", both)
    folder = BitsandbytesExporter(dense_bits=8).export(both, tmp_path / "out")
    assert self_check(BitsandbytesExporter(dense_bits=8), both, folder).passed
    assert "model.layers.1.mlp.up_proj" in (folder / "config.json").read_text()
    for place in sorted((tmp_path / "out").rglob("*"), reverse=True):
        place.rmdir() if place.is_dir() else place.unlink()
    (tmp_path / "out").rmdir()
    refused("hqq at 2 bits is no code of bitsandbytes", mixed_backbone(tiny_backbone))
    dense = tiny_backbone(bits=(16,))
    dense.activate(Configuration.uniform(16, 0, 3), seed=0)
    refused("every layer would be written in 16 bits", dense)
