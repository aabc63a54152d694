"""Every registered quantizer keeps its contract."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from qratk.quantizers.base import Quantizer, quantizers
from qratk.testing import QuantizerContract


class TestBuiltInQuantizers(QuantizerContract):
    @pytest.fixture(params=quantizers.names())
    def make(self, request: pytest.FixtureRequest) -> Callable[[], Quantizer]:
        return lambda: quantizers.create(request.param)


@pytest.mark.usefixtures("processor")
class TestNF4OnEveryProcessor(QuantizerContract):
    shapes = ((64, 64), (32, 96), (48, 80), (17, 64), (6, 10), (5, 7))

    @pytest.fixture(params=[64, 2048])
    def make(self, request: pytest.FixtureRequest) -> Callable[[], Quantizer]:
        return lambda: quantizers.create("nf4", block_size=request.param)
