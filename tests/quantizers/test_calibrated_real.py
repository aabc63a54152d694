"""Calibrated quantisers on a small released model, found through the environment variable QRATK_SHARED."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from qratk.core import Configuration
from qratk.quantizers.base import quantizers

SHARED = os.environ.get("QRATK_SHARED")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(SHARED is None, reason="QRATK_SHARED names no directory of models"),
]


def sequences(backbone, split, count):
    path = Path(str(SHARED)) / "datasets" / "stories_lower_lm" / f"{split}.jsonl"
    with path.open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"][:200] for line, _ in zip(lines, range(count), strict=False)]
    made = []
    for text in texts:
        ids = torch.tensor([backbone.tokenizer(text)["input_ids"][:256]])
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return made


def losses(name, *, calibrate=True, **options):
    """Mean losses on held-out stories at 4, 3 and 2 bits."""
    from qratk.backbone.backbone import Backbone

    quantizer = quantizers.create(name, group_size=32, **options)
    if not calibrate:  # as if it were one that needs no data
        object.__setattr__(quantizer, "calibrated", False)
    path = Path(str(SHARED)) / "models" / "babyllama105"
    backbone = Backbone.load(path, quantizers=dict.fromkeys((2, 3, 4), quantizer), bank_dir=None)
    backbone.calibrate(sequences(backbone, "train", 64))
    backbone.build_bank([2, 3, 4])
    found = []
    for bits in (4, 3, 2):
        backbone.activate(Configuration.uniform(bits, 0, len(backbone.layers)), seed=0)
        with torch.no_grad():
            each = [backbone.model(**b, labels=b["input_ids"]).loss for b in sequences(backbone, "test", 40)]
        found.append(float(torch.stack(each).mean()))
    return found


def test_gptq_loses_less_than_rounding_to_nearest_and_than_hqq():
    gptq, nearest, hqq = losses("gptq"), losses("gptq", calibrate=False), losses("hqq")
    assert all(ours < other for ours, other in zip(gptq, nearest, strict=True))
    assert all(ours < other for ours, other in zip(gptq, hqq, strict=True))


def test_awq_loses_less_than_rounding_to_nearest_at_four_bits():
    assert losses("awq")[0] < losses("awq", calibrate=False)[0]
