"""Every registered executor against the contract suite."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from qratk.executors.base import Executor, executors
from qratk.testing import ExecutorContract


class TestExecutors(ExecutorContract):
    @pytest.fixture(params=executors.names())
    def make(self, request: pytest.FixtureRequest) -> Callable[[], Executor]:
        return partial(executors.create, request.param)
