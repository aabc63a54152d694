"""Every registered adapter method keeps its contract."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from qratk.adapters.base import AdapterMethod, adapters
from qratk.testing import AdapterContract


class TestBuiltInAdapters(AdapterContract):
    @pytest.fixture(params=adapters.names())
    def make(self, request: pytest.FixtureRequest) -> Callable[[], AdapterMethod]:
        return lambda: adapters.create(request.param)
