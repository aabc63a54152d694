"""Recipes in the words of other tools: taken by those that are here, and telling the configuration."""

from __future__ import annotations

import json
import runpy

import pytest
import torch
import yaml

from qratk.core.configuration import Configuration
from qratk.exporters.recipe import RecipeExporter
from qratk.quantizers.base import quantizers

MIXED = Configuration.of([2, 4, 8, 16], [2, 0, 8, 3])


@pytest.fixture
def backbone(tiny_backbone):
    table = {bits: quantizers.create("affine", group_size=32, symmetric=bits == 8) for bits in (2, 4, 8)}
    backbone = tiny_backbone(quantizers=table, bits=(2, 4, 8, 16), layers=4)
    backbone.activate(MIXED, seed=0)
    return backbone


def test_peft_makes_adapters_of_the_ranks_and_scales(backbone, tiny_model, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    folder = RecipeExporter().export(backbone, tmp_path / "out")
    told = json.loads((folder / "peft.json").read_text())
    made = get_peft_model(tiny_model("llama", layers=4), LoraConfig(**told))
    begun = PeftModel.from_pretrained(tiny_model("llama", layers=4), folder / "start", is_trainable=True)
    for model in (made, begun):
        layers = model.get_base_model().model.layers
        assert [layers[index].mlp.up_proj.r["default"] for index in (0, 2, 3)] == [2, 8, 3]
        assert {layers[index].self_attn.q_proj.scaling["default"] for index in (0, 2, 3)} == {2.0}
        assert not hasattr(layers[1].mlp.up_proj, "lora_A")
    layer = begun.get_base_model().model.layers[0].mlp.up_proj
    assert layer.lora_A["default"].weight.requires_grad
    assert not layer.lora_B["default"].weight.any()
    assert layer.lora_A["default"].weight.any()


def test_axolotl_goes_on_from_the_adapter(backbone, tmp_path):
    document = yaml.safe_load((RecipeExporter().export(backbone, tmp_path / "out") / "axolotl.yaml").read_text())
    assert (document["adapter"], document["lora_model_dir"], document["lora_r"]) == ("lora", "./start", 8)
    assert "q_proj" in document["lora_target_modules"]


def test_quantisers_are_told_the_bits(backbone, tmp_path):
    folder = RecipeExporter().export(backbone, tmp_path / "out")
    predicate = runpy.run_path(str(folder / "mlx_predicate.py"))["quant_predicate"]
    assert predicate("model.layers.0.mlp.up_proj", None, {}) == {"group_size": 32, "bits": 2}
    assert predicate("model.layers.3.mlp.up_proj", None) is False
    layers = json.loads((folder / "auto_round.json").read_text())
    assert layers["model.layers.2.mlp.up_proj"] == {"bits": 8, "group_size": 32, "sym": True}
    assert layers["model.layers.3.mlp.up_proj"] == {"bits": 16}
    lines = (folder / "llama_tensor_types.txt").read_text().split()
    assert len(lines) == 28
    assert r"^blk\.2\.attn_k\.weight$=q8_0" in lines


def test_what_is_left_out_is_said(tiny_backbone, tmp_path):
    backbone = tiny_backbone("gpt2", bits=(4,))
    backbone.activate(Configuration.uniform(4, 0, 3), seed=0)
    exporter = RecipeExporter()
    folder = exporter.export(backbone, tmp_path / "out")
    assert sorted(path.name for path in folder.iterdir()) == ["SHA256SUMS", "auto_round.json", "mlx_predicate.py"]
    assert [note.partition(" ")[0] for note in exporter.notes(backbone)] == ["every", "llama_tensor_types.txt"]
    assert exporter.reload(backbone, folder) is None
    assert torch.is_tensor(backbone.fixed_tensors()["transformer.wte.weight"])
