"""Our own form, loaded by transformers and PEFT as any model: the same logits as `load_quantized`."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
import torch
from exported import MIXED, mixed_backbone
from safetensors.torch import load_file, save_file

from qratk.core.errors import ConfigurationError
from qratk.exporters._transformers import PackedLinear
from qratk.exporters.packed import METHOD, PackedExporter, load_quantized
from qratk.exporters.registration import announce
from qratk.quantizers.base import quantizers

HOME = "transformers.quantizers.auto"


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def loaded(folder, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options)


def with_adapter(model, folder):
    from peft import PeftModel

    return PeftModel.from_pretrained(model, folder / "adapter").eval()


def other_quantisers(tiny_backbone):
    """At 2 to 8 bits affine, gptq, awq and slim where they are, with the calibration that some want."""
    names = {2: "affine", 3: "gptq", 4: "awq", 8: "affine"}
    table = {bits: quantizers.create(name, group_size=32) for bits, name in names.items()}
    backbone = tiny_backbone(quantizers=table, layers=5)
    ids = torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(1))
    backbone.calibrate([{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    backbone.build_bank([2, 3, 4, 8, 16])
    backbone.activate(MIXED, seed=3)
    return backbone


@pytest.mark.parametrize("family", ["llama", "gpt2", "other quantisers"])
def test_logits_are_those_of_our_own_reader_and_with_peft_those_of_the_search(
    family, tiny_backbone, tiny_batch, tmp_path
):
    backbone = other_quantisers(tiny_backbone) if "other" in family else mixed_backbone(tiny_backbone, family)
    folder = PackedExporter().export(backbone, tmp_path / "out")
    model = loaded(folder)
    assert torch.equal(logits(model, tiny_batch), logits(load_quantized(folder).model, tiny_batch))
    with backbone.stored_precision():
        assert torch.equal(logits(with_adapter(model, folder), tiny_batch), logits(backbone.model, tiny_batch))


def test_adapters_can_be_trained_on_it(tiny_backbone, tiny_batch, tmp_path):
    from peft import LoraConfig, get_peft_model

    folder = PackedExporter().export(mixed_backbone(tiny_backbone), tmp_path / "out")
    model = get_peft_model(loaded(folder), LoraConfig(r=2, target_modules=["up_proj"]))
    model(**tiny_batch, labels=tiny_batch["input_ids"]).loss.backward()
    gradients = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    assert len(gradients) == 5
    assert all(gradient.any() for gradient in gradients)


def test_a_change_of_type_leaves_what_is_packed_alone(tiny_backbone, tiny_batch, tmp_path):
    folder = PackedExporter().export(mixed_backbone(tiny_backbone), tmp_path / "out")
    model = loaded(folder, dtype=torch.bfloat16)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    stored = load_file(folder / "quantized.safetensors")
    assert len(layers) == 35
    for _ in range(2):
        for name, layer in layers.items():
            for part, tensor in layer.named_buffers():
                assert tensor.dtype == stored[f"{name}.{part}"].dtype
                assert torch.equal(tensor, stored[f"{name}.{part}"])
        assert logits(model, tiny_batch).dtype == model.lm_head.weight.dtype
        torch.nn.Module.float(model)  # transformers' own refuses for every quantised model


def test_transformers_writes_it_again(tiny_backbone, tiny_batch, tmp_path):
    folder = PackedExporter().export(mixed_backbone(tiny_backbone), tmp_path / "out")
    model = loaded(folder)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(loaded(tmp_path / "again"), tiny_batch), logits(model, tiny_batch))


def test_embeddings_keep_the_16_bits_of_their_checkpoint(tiny_backbone, tmp_path):
    backbone = mixed_backbone(tiny_backbone)
    assert backbone.compute_dtype == torch.float32
    folder = PackedExporter().export(backbone, tmp_path / "out")
    assert {tensor.dtype for tensor in load_file(folder / "fixed.safetensors").values()} == {torch.bfloat16}
    for name, tensor in load_quantized(folder).fixed_tensors().items():
        assert torch.equal(tensor, backbone.fixed_tensors()[name])
        assert tensor.dtype == torch.float32


def test_folder_of_the_first_version_is_read(tiny_backbone, tiny_batch, tmp_path):
    backbone = mixed_backbone(tiny_backbone)
    folder = PackedExporter().export(backbone, tmp_path / "out")
    expected = logits(load_quantized(folder).model, tiny_batch)
    layers = load_file(folder / "quantized.safetensors")
    renamed = {
        "/".join((n.rpartition(".")[0], n.rpartition(".")[2].replace("weight", "codes"))): t for n, t in layers.items()
    }
    save_file(renamed, folder / "quantized.safetensors")
    save_file({n: t.float() for n, t in backbone.fixed_tensors().items()}, folder / "fixed.safetensors")
    for name, change in (("quantized.json", {"version": 1}), ("config.json", {"quantization_config": None})):
        document = json.loads((folder / name).read_text()) | change
        (folder / name).write_text(json.dumps({k: v for k, v in document.items() if v is not None}))
    for name in ("SHA256SUMS", "model.safetensors.index.json"):
        (folder / name).unlink()
    again = load_quantized(folder)
    assert torch.equal(logits(again.model, tiny_batch), expected)
    assert again.digest() == backbone.digest()


def test_transformers_without_qratk_makes_no_other_model_of_it(tiny_backbone, tmp_path, monkeypatch):
    auto = importlib.import_module(HOME)
    folder = PackedExporter().export(mixed_backbone(tiny_backbone), tmp_path / "out")
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, METHOD)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        loaded(folder)


def test_a_model_of_another_kind_is_refused(tiny_backbone, tmp_path):
    from transformers import AutoModel

    folder = PackedExporter().export(mixed_backbone(tiny_backbone), tmp_path / "out")
    with pytest.raises(ConfigurationError, match="AutoModelForCausalLM"):
        AutoModel.from_pretrained(folder)


def test_registry_that_is_loaded_later_is_written_to(monkeypatch):
    former = importlib.import_module(HOME)
    assert METHOD in former.AUTO_QUANTIZER_MAPPING
    announce()  # again, which does nothing
    monkeypatch.setattr("transformers.quantizers.auto", former)  # put back, with the entry of the modules
    monkeypatch.delitem(sys.modules, HOME)
    before = list(sys.meta_path)
    announce()
    announce()
    assert len(sys.meta_path) == len(before) + 1
    later = importlib.import_module(HOME)
    assert later is not former
    assert METHOD in later.AUTO_QUANTIZER_MAPPING
    assert METHOD in later.AUTO_QUANTIZATION_CONFIG_MAPPING
    assert sys.meta_path == before
    assert type(later.__spec__.loader) is type(former.__spec__.loader)
