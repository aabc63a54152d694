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
