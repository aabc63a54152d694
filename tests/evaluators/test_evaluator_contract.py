"""Evaluators that need no model keep their contract."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from qratk.evaluators.base import Evaluator
from qratk.evaluators.simulated import SimulatedEvaluator
from qratk.testing import EvaluatorContract


class TestSimulated(EvaluatorContract):
    @pytest.fixture(params=[0.0, 0.4])
    def make(self, request: pytest.FixtureRequest) -> Callable[[], Evaluator]:
        return lambda: SimulatedEvaluator(num_layers=4, failures=request.param)
