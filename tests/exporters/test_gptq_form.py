"""GPTQ's form: the very codes, read back by another reader than the one that packs, with bits by layer."""

from __future__ import annotations

import json
import re

import pytest
import torch
from exported import mixed_backbone

from qratk.adapters.base import adapters
from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError, QuantizationError
from qratk.exporters._gptq_reader import read_gptq
from qratk.exporters.base import EXACT
from qratk.exporters.gptq import GptqExporter
from qratk.exporters.selfcheck import self_check
from qratk.quantizers.base import quantizers


def table(name="affine", **options):
    return {bits: quantizers.create(name, **{"group_size": 32, **options}) for bits in (2, 3, 4, 8)}


@pytest.mark.parametrize(("family", "options"), [("llama", {}), ("qwen2", {"symmetric": True})])
def test_weights_are_those_of_the_bank_to_the_bit(family, options, tiny_backbone, tmp_path):
    backbone = mixed_backbone(tiny_backbone, family, quantizers=table(**options))
    exporter = GptqExporter()
    folder = exporter.export(backbone, tmp_path / "out")
    read = read_gptq(folder)
    for name, bank in backbone.banks.items():
        expected = bank.dequantized(bank.active)
        assert torch.equal(
            read[f"{name}.weight"]().float(), expected if bank.active < 16 else expected.half().float()
        ), name
    assert self_check(exporter, backbone, folder).passed


def test_rules_of_dynamic_tell_the_bits_of_each_projection(tiny_backbone, tmp_path):
    backbone = mixed_backbone(tiny_backbone, quantizers=table(metadata_dtype="bfloat16"))
    exporter = GptqExporter()
    folder = exporter.export(backbone, tmp_path / "out")
    settings = json.loads((folder / "quantize_config.json").read_text())
    assert json.loads((folder / "config.json").read_text())["quantization_config"] == settings
    assert settings["checkpoint_format"] == "gptq_v2"
    for name, bank in backbone.banks.items():
        rules = [(p, rule) for p, rule in settings["dynamic"].items() if re.match(p[2:], name)]
        assert len(rules) <= 1
        left_out = bool(rules) and rules[0][0].startswith("-:")
        assert left_out == (bank.active == 16)
        if not left_out:
            assert {**settings, **(rules[0][1] if rules else {})}["bits"] == bank.active
    found = self_check(exporter, backbone, folder)
    assert (found.passed, found.tolerance) == (True, EXACT)  # the model's weights are bfloat16, too


def test_what_the_form_cannot_hold_is_said(tiny_backbone, tmp_path):
    def refused(error, match, backbone, **options):
        with pytest.raises(error, match=match):
            GptqExporter(**options).export(backbone, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    mixture = {4: quantizers.create("affine", group_size=32), 8: quantizers.create("int8")}
    eights = mixed_backbone(
        tiny_backbone, quantizers=mixture, bits=(4, 8), layers=2, configuration=Configuration.of([4, 8], [2, 2])
    )
    refused(QuantizationError, r"int8 at 8 bits has no 16-bit scales.*--dense-bits 8", eights)
    GptqExporter(dense_bits=8).check(eights)
    odd = tiny_backbone(
        quantizers={4: quantizers.create("affine", group_size=16)}, bits=(4,), hidden=48, intermediate=48
    )
    odd.activate(Configuration.uniform(4, 0, 3), seed=0)
    GptqExporter().check(odd)
    thirds = tiny_backbone(quantizers={3: quantizers.create("affine", group_size=16)}, bits=(3,), intermediate=48)
    thirds.activate(Configuration.uniform(3, 0, 3), seed=0)
    refused(QuantizationError, r"48 x 64 does not divide by 32", thirds)
    small = tiny_backbone(quantizers={4: quantizers.create("affine", group_size=8)}, bits=(4,))
    small.activate(Configuration.uniform(4, 0, 3), seed=0)
    refused(QuantizationError, r"in groups of \(16, 32", small)
    refused(
        ConfigurationError, "no DoRA", mixed_backbone(tiny_backbone, quantizers=table(), method=adapters.create("dora"))
    )
    dense = tiny_backbone(bits=(16,))
    dense.activate(Configuration.uniform(16, 0, 3), seed=0)
    refused(QuantizationError, "every layer would be written in 16 bits", dense)
