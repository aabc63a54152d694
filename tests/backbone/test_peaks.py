"""Foretold peaks against measured ones."""

from __future__ import annotations

import pytest
import torch

from qratk.backbone.measure import allocated_peak, measured_peak
from qratk.backbone.peaks import UniformPeaks
from qratk.backbone.trace import PeakTracer, traced_peak
from qratk.core.configuration import Configuration
from qratk.core.memory import PEAK_PARTS
from qratk.core.space import SearchSpace

ACTIVATIONS = {"batch_size": 4, "sequence_length": 48}
WEIGHTS = {"batch_size": 1, "sequence_length": 8}
CASES = {
    "activations": ACTIVATIONS,
    "weights": WEIGHTS,
    "checkpointing": {**ACTIVATIONS, "gradient_checkpointing": True},
    "dense_cache": {**WEIGHTS, "dense_cache": True},
}
CONFIGURATIONS = ("4:8 4:8 4:8", "2:4 3:16 16:8", "16:0 8:4 4:4")


def space_of(backbone, bits=(2, 4, 8), ranks=(4, 8, 16)):
    return SearchSpace(bits, ranks, tuple(shape.name for shape in backbone.shapes))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt_neox"])
def test_foretold_peak_is_the_measured_one_within_two_percent(family, case, tiny_backbone):
    for text in CONFIGURATIONS:
        backbone, configuration = tiny_backbone(family), Configuration.from_text(text)
        foretold = traced_peak(backbone, configuration, **CASES[case])
        assert foretold.peak == pytest.approx(measured_peak(backbone, configuration, **CASES[case]), rel=0.02)
        assert sum(foretold.parts.values()) == foretold.peak
        assert set(foretold.parts) == set(PEAK_PARTS)
