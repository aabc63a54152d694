"""Every registered start keeps its contract."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from qratk.adapters.starts.base import Start, starts
from qratk.testing import StartContract


class TestBuiltInStarts(StartContract):
    @pytest.fixture(params=starts.names())
    def make(self, request: pytest.FixtureRequest) -> Callable[[], Start]:
        return lambda: starts.create(request.param)
