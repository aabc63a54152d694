"""Small released models, found through the environment variable QRATK_SHARED."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from qratk.backbone.backbone import Backbone
from qratk.core.configuration import Configuration
from qratk.core.space import SearchSpace
from qratk.exporters.packed import load_quantized, save_quantized, stored_bytes
from qratk.peaks.foretold import memory_model
from qratk.quantizers.base import quantizers

SHARED = os.environ.get("QRATK_SHARED")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(SHARED is None, reason="QRATK_SHARED names no directory of models"),
]
MODELS = ("stories260k", "babyllama105", "deep12")
TEXT = "Once upon a time, there was a little girl named Lily. She liked to play outside in the park with her mom. "


def load(name, **options):
    hqq = quantizers.create("hqq", group_size=32)
    table = {2: hqq, 3: hqq, 4: quantizers.create("nf4"), 8: quantizers.create("int8"), 16: quantizers.create("none")}
    return Backbone.load(Path(str(SHARED)) / "models" / name, quantizers=table, **options)


def loss_of(backbone, text=TEXT):
    ids = torch.tensor([backbone.tokenizer(text)["input_ids"][:128]])
    with torch.no_grad():
        return float(backbone.model(input_ids=ids, labels=ids).loss)


def stories(count=20):
    path = Path(str(SHARED)) / "datasets" / "stories_lower_lm" / "test.jsonl"
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line, _ in zip(lines, range(count), strict=False)]


@pytest.mark.parametrize("name", MODELS)
def test_fewer_bits_lose_more_and_eight_bits_next_to_nothing(name):
    backbone = load(name)
    backbone.build_bank([2, 3, 4, 8])
    losses = []
    for bits in (16, 8, 4, 3, 2):
        backbone.activate(Configuration.uniform(bits, 0, len(backbone.layers)), seed=0)
        losses.append(sum(loss_of(backbone, text) for text in stories()))
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert losses[1] < losses[2] < losses[3] < losses[4]


@pytest.mark.parametrize("name", MODELS)
def test_bytes_foretold_without_weights_are_those_on_disk(name, tmp_path):
    meta, backbone = load(name, weights=False), load(name)
    space = SearchSpace((2, 4, 8, 16), (0, 8), tuple(shape.name for shape in backbone.shapes))
    configuration = Configuration.of(
        [(2, 4, 8, 16)[i % 4] for i in range(len(space.layer_names))], [8] * space.num_layers
    )
    backbone.build_bank(space.bits)
    backbone.activate(configuration, seed=0)
    save_quantized(backbone, configuration, tmp_path)
    footprint = memory_model(meta, space).footprint(configuration)
    assert footprint == memory_model(backbone, space).footprint(configuration)
    assert stored_bytes(tmp_path) == footprint.storage_bytes - footprint.adapters
    again = load_quantized(tmp_path)
    assert loss_of(again) == loss_of(backbone)
    assert again.tokenizer is not None


def test_text_is_generated_through_the_peft_model():
    backbone = load("stories260k")
    backbone.build_bank([4])
    backbone.activate(Configuration.uniform(4, 8, len(backbone.layers)), seed=0)
    ids = torch.tensor([backbone.tokenizer("Once upon a time")["input_ids"]])
    out = backbone.model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    assert out.shape[1] > ids.shape[1]
