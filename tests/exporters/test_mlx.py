"""MLX's form: codes, scales and lowest values, read back by another reader than the one that packs, and by mlx."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from exported import mixed_backbone

from qratk.adapters.base import adapters
from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError, QuantizationError, UnsupportedModelError
from qratk.exporters._mlx_reader import read_mlx, read_mlx_adapter
from qratk.exporters.base import EXACT
from qratk.exporters.mlx import MlxExporter
from qratk.exporters.selfcheck import self_check
from qratk.quantizers.base import quantizers


def table(name="affine", **options):
    return {bits: quantizers.create(name, **{"group_size": 32, **options}) for bits in (2, 3, 4, 8)}


@pytest.mark.parametrize("family", ["qwen2", "gemma"])
def test_symmetric_codes_and_those_in_float32_lose_nothing(family, tiny_backbone, tmp_path):
    for place, options, exporter in (
        ("symmetric", {"symmetric": True, "metadata_dtype": "bfloat16"}, MlxExporter()),
        ("wide", {}, MlxExporter("float32")),
    ):
        backbone = mixed_backbone(tiny_backbone, family, quantizers=table(**options))
        folder = exporter.export(backbone, tmp_path / place)
        read = read_mlx(folder)
        for name, bank in backbone.banks.items():
            torch.testing.assert_close(
                read[f"{name}.weight"]().float(), bank.dequantized(bank.active), rtol=0, atol=1e-7
            )
        found = self_check(exporter, backbone, folder)
        assert (found.passed, found.tolerance) == (True, EXACT)


def test_bits_and_groups_are_told_by_module(tiny_backbone, tmp_path):
    backbone = mixed_backbone(tiny_backbone, quantizers=table())
    exporter = MlxExporter()
    folder = exporter.export(backbone, tmp_path / "out")
    told = json.loads((folder / "config.json").read_text())["quantization"]
    for name, bank in backbone.banks.items():
        assert told.get(name) == (None if bank.active == 16 else {"group_size": 32, "bits": bank.active})
    assert (told["mode"], told["group_size"]) == ("affine", 32)
    found = self_check(exporter, backbone, folder)  # lowest values in float16
    assert found.passed
    assert found.tolerance > EXACT


def test_rows_of_int8_and_zero_points_of_hqq_fit_groups(tiny_backbone, tmp_path):
    mixture = {4: quantizers.create("hqq", group_size=32), 8: quantizers.create("int8")}
    backbone = mixed_backbone(
        tiny_backbone, quantizers=mixture, bits=(4, 8), layers=2, configuration=Configuration.of([4, 8], [2, 2])
    )
    exporter = MlxExporter("float32")
    folder = exporter.export(backbone, tmp_path / "out")
    told = json.loads((folder / "config.json").read_text())["quantization"]
    assert told["model.layers.1.mlp.down_proj"] == {"group_size": 128, "bits": 8}
    assert told["model.layers.1.mlp.up_proj"] == {"group_size": 64, "bits": 8}
    assert self_check(exporter, backbone, folder).passed


def test_adapter_has_one_rank_and_its_scale_in_b(tiny_backbone, tmp_path):
    backbone = mixed_backbone(tiny_backbone, quantizers=table())
    folder = MlxExporter().export(backbone, tmp_path / "out")
    told = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (told["fine_tune_type"], told["num_layers"]) == ("lora", 5)
    assert told["lora_parameters"]["rank"] == 8
    assert told["lora_parameters"]["scale"] == 1.0
    pairs = read_mlx_adapter(folder / "adapter")
    with backbone.stored_precision():
        for name in backbone.banks:
            expected = backbone.adapters.delta(name)
            if name not in pairs:
                assert not expected.any()
                continue
            found = pairs[name].added_to(torch.zeros_like(expected))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_what_mlx_cannot_hold_is_said(tiny_backbone, tmp_path):
    def refused(error, match, backbone, **options):
        with pytest.raises(error, match=match):
            MlxExporter(**options).export(backbone, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def uniform(family="llama", bits=4, **options):
        backbone = tiny_backbone(family, bits=(bits,), **options)
        backbone.activate(Configuration.uniform(bits, 0, 3), seed=0)
        return backbone

    refused(
        QuantizationError, r"nf4 at 4 bits has no scales and zero points in groups of 32, 64 or 128.*dense", uniform()
    )
    small = {4: quantizers.create("affine", group_size=16)}
    refused(QuantizationError, "in groups of 32, 64 or 128", uniform(quantizers=small))
    refused(UnsupportedModelError, r"'gpt2'.*'recipe'", uniform("gpt2", quantizers=table()))
    refused(QuantizationError, "every layer would be written in 16 bits", uniform(bits=16))
    refused(
        ConfigurationError, "no DoRA", mixed_backbone(tiny_backbone, quantizers=table(), method=adapters.create("dora"))
    )
    with pytest.raises(ConfigurationError, match="dtype must be one of"):
        MlxExporter("int8")


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_mlx_lm_gives_our_logits_with_the_adapter(dtype, tiny_backbone, tmp_path):
    mx = pytest.importorskip("mlx.core")
    utils = pytest.importorskip("mlx_lm.utils")
    backbone = mixed_backbone(tiny_backbone, quantizers=table())
    folder = MlxExporter(dtype).export(backbone, tmp_path / "out")
    ids = torch.arange(4, 28).reshape(2, 12)
    model, _ = utils.load_model(folder)
    utils.load_adapters(model, str(folder / "adapter"))
    theirs = torch.from_numpy(np.array(model(mx.array(ids.numpy())).astype(mx.float32)))
    with torch.no_grad(), backbone.stored_precision():
        ours = backbone.model(input_ids=ids).logits
    limit = 1e-4 if dtype == "float32" else 2e-2
    assert float((theirs - ours).norm() / ours.norm()) < limit
