"""Traces of equal models are made once: tests load the same tiny model again and again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from qratk.backbone.backbone import Backbone
from qratk.bank.table import describe, options
from qratk.peaks import uniform

_TRACED: dict[tuple[Any, ...], uniform.UniformPeaks] = {}
_trace = uniform.UniformPeaks


def _alike(backbone: Backbone) -> tuple[Any, ...]:
    """All of a backbone that a trace depends on."""
    method = backbone.adapters.method.traced
    return (
        backbone.config.to_json_string(),
        tuple((bits, describe(quantizer)) for bits, quantizer in backbone.table.quantizers.items()),
        tuple((name, bank.shape, bank.bias is None, bank.device.type) for name, bank in backbone.banks.items()),
        backbone.granularity,
        backbone.compute_dtype,
        backbone.adapters.options,
        type(method),
        repr(options(method)),
    )


@contextmanager
def traced_once() -> Iterator[None]:
    """Within it, the peaks of a model are traced only if those of an equal one have not been."""

    def peaks(backbone: Backbone, **given: Any) -> uniform.UniformPeaks:
        key = (*_alike(backbone), *sorted(given.items()))
        if key not in _TRACED:
            _TRACED[key] = _trace(backbone, **given)
        return _TRACED[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uniform, "UniformPeaks", peaks)
        yield
