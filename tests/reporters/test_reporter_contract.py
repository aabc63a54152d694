"""Every registered reporter keeps the contract; the list of them may be chosen in the search section."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from qratk.reporters.base import Reporter, reporters
from qratk.settings.recipe import autoqra, from_section
from qratk.testing import ReporterContract, ToyEvaluator


class TestReporters(ReporterContract):
    @pytest.fixture(params=reporters.names())
    def make(self, request: pytest.FixtureRequest) -> Callable[[], Reporter]:
        return partial(reporters.create, request.param)


def test_reporters_of_a_search_are_chosen_by_name() -> None:
    loop = from_section({"reporters": ["files", {"class_path": "terminal", "init_args": {"plain": True}}]})
    assert [type(reporter).__name__ for reporter in loop.reporters] == ["RunFiles", "TerminalReporter"]


def test_by_default_all_of_today_are_told() -> None:
    loop = autoqra(evaluator=ToyEvaluator(2, 0))
    assert {reporters.name_of(f"{type(r).__module__}.{type(r).__qualname__}") for r in loop.reporters} == set(reporters)
