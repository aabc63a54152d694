"""PEFT folders as matrices: read by PEFT's rules, padded without a change of the product, and put back."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel

from qratk.adapters.base import adapters
from qratk.adapters.matrices.folder import name_base, put_pairs, read_pairs, write_padded
from qratk.adapters.options import AdapterOptions
from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError
from qratk.exporters.dense import merged_model

RANKS = Configuration.of([16, 16, 16], [2, 0, 5])


def adapted(tiny_backbone, **options):
    backbone = tiny_backbone(bits=(16,), **options)
    backbone.activate(RANKS, seed=3)
    generator = torch.Generator().manual_seed(0)
    state = {n: 0.2 * torch.randn(t.shape, generator=generator) for n, t in backbone.adapter_state().items()}
    backbone.load_adapter_state(state)
    return backbone


def base(backbone):
    return merged_model(backbone, base=True)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", {}), ("lora", {"rslora": True, "alpha": 10.0}), ("lora", {"dtype": "int8"}),
        ("lora", {"input_groups": 4}), ("dora", {}), ("dora", {"dtype": "int8"}),
    ],
    ids=str,
)  # fmt: skip
def test_folder_comes_back_into_adapters_as_it_was_stored(method, options, tiny_backbone, tmp_path):
    made = {"method": adapters.create(method), "adapter": AdapterOptions(**options)}
    backbone = adapted(tiny_backbone, **made)
    backbone.adapters.save(tmp_path / "a")
    again = tiny_backbone(bits=(16,), **made)
    again.activate(RANKS, seed=9)
    put_pairs(again.adapters, read_pairs(tmp_path / "a"))
    again.adapters.save(tmp_path / "b")
    read = [(tmp_path / n / "adapter_model.safetensors").read_bytes() for n in "ab"]
    assert read[0] == read[1]
    ours, theirs = backbone.adapters.stored_tensors(), again.adapters.stored_tensors()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize("options", [{}, {"rslora": True, "alpha": 10.0}, {"alpha_over_rank": 0.25}], ids=str)
def test_padded_folder_has_one_rank_and_the_same_product_in_peft(options, tiny_backbone, tiny_batch, tmp_path):
    backbone = adapted(tiny_backbone, adapter=AdapterOptions(**options))
    backbone.adapters.save(tmp_path / "own")
    write_padded(tmp_path / "own", tmp_path / "padded", base="base")
    config = json.loads((tmp_path / "padded" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (5, 5, "base")
    assert [config[key] for key in ("rank_pattern", "alpha_pattern", "use_rslora")] == [{}, {}, False]
    pairs = read_pairs(tmp_path / "padded")
    assert {pair.rank for pair in pairs.values()} == {5}
    assert {pair.b.dtype for pair in pairs.values()} == {torch.float32 if "rslora" in options else torch.bfloat16}
    own, padded = (PeftModel.from_pretrained(base(backbone), tmp_path / name).eval() for name in ("own", "padded"))
    with torch.no_grad():
        torch.testing.assert_close(padded(**tiny_batch).logits, own(**tiny_batch).logits, rtol=0, atol=2e-6)


def test_other_factor_or_model_is_refused(tiny_backbone, tmp_path):
    adapted(tiny_backbone).adapters.save(tmp_path)
    other = tiny_backbone(bits=(16,), adapter=AdapterOptions(alpha_over_rank=1.0))
    other.activate(RANKS, seed=0)
    with pytest.raises(ConfigurationError, match="has the factor 2, and the settings say 1"):
        put_pairs(other.adapters, read_pairs(tmp_path))
    smaller = tiny_backbone(bits=(16,), layers=2)
    smaller.activate(Configuration.of([16, 16], [2, 0]), seed=0)
    with pytest.raises(ConfigurationError, match="of another model"):
        put_pairs(smaller.adapters, read_pairs(tmp_path))


def test_base_is_named(tiny_backbone, tmp_path):
    adapted(tiny_backbone).adapters.save(tmp_path)
    name_base(tmp_path, "elsewhere")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "elsewhere"
