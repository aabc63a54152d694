"""Contract suite of reporters: a small search on the toy problem, told in order, cut short, resumed and shuffled.

Override the fixture `make`: it returns a callable that builds a new reporter.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qratk.core.errors import QratkError
from qratk.core.result import GenerationSummary, Progress, Record, RefinementSummary, SearchPlan, SearchResult
from qratk.core.work import Work
from qratk.reporters.base import Destination, Reporter
from qratk.reporters.multi import Reporters
from qratk.run import files
from qratk.run.journal import read_journal
from qratk.settings.recipe import autoqra
from qratk.testing.toy import ToyEvaluator


@dataclass(frozen=True)
class Event:
    """One call of a reporter's method."""

    name: str
    arguments: tuple[Any, ...]

    def tell(self, reporter: Reporter) -> None:
        """Make the call."""
        getattr(reporter, self.name)(*self.arguments)


class _Listener(Reporter):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def open(self, destination: Destination) -> None:
        """Nothing: it writes nothing."""

    def started(self, plan: SearchPlan) -> None:
        self.events.append(Event("started", (plan,)))

    def message(self, text: str) -> None:
        self.events.append(Event("message", (text,)))

    def working(self, work: Work) -> None:
        """Of no interest: how often depends on the search's parts."""

    def progress(self, progress: Progress) -> None:
        self.events.append(Event("progress", (progress,)))

    def evaluated(self, record: Record, progress: Progress) -> None:
        self.events.append(Event("evaluated", (record, progress)))

    def generation(self, summary: GenerationSummary) -> None:
        self.events.append(Event("generation", (summary,)))

    def refinement(self, summary: RefinementSummary) -> None:
        self.events.append(Event("refinement", (summary,)))

    def finished(self, result: SearchResult) -> None:
        self.events.append(Event("finished", (result,)))

    def close(self) -> None:
        """Nothing is kept open."""


def small_search(run_dir: Path, reporter: Reporter) -> SearchResult:
    """A search over four layers with failures, two generations and two steps of refinement."""
    loop = autoqra(
        evaluator=ToyEvaluator(4, 1, failures=0.1), like=[4, 8], steps=[10, 30], generations=2,
        searcher={"random": {"offspring": 5}}, refiner={"hill_climb": {"max_evaluations": 3}}, surrogate="none",
        references=[[8, 16]], reporters=[],
    )  # fmt: skip
    return loop.run(run_dir=run_dir, reporter=reporter, config={})


@functools.cache
def small_search_told() -> tuple[Event, ...]:
    """What a small search tells, with one message of control codes and markup among it."""
    listener = _Listener()
    with tempfile.TemporaryDirectory() as folder:
        small_search(Path(folder), listener)
    odd = Event("message", ("a [bold]warning[/bold]\x1b[31m\nof two lines: \u2581",))
    return (listener.events[0], odd, *listener.events[1:])


class ReporterContract:
    """What every reporter promises."""

    @pytest.fixture
    def make(self) -> Callable[[], Reporter]:
        """A callable that builds the reporter under test."""
        raise NotImplementedError(f"{type(self).__name__} must override the fixture 'make'")

    @pytest.fixture
    def events(self) -> tuple[Event, ...]:
        """What a small search tells."""
        return small_search_told()

    def test_whole_search_can_be_told(
        self, make: Callable[[], Reporter], events: tuple[Event, ...], tmp_path: Path
    ) -> None:
        reporter = make()
        reporter.open(Destination(tmp_path / "run"))
        for event in events:
            event.tell(reporter)
        reporter.close()

    def test_resumed_search_can_be_told_in_the_folder_of_its_first_part(
        self, make: Callable[[], Reporter], events: tuple[Event, ...], tmp_path: Path
    ) -> None:
        half = len(events) // 2
        known = sum(event.name == "evaluated" for event in events[:half])
        (plan,) = events[0].arguments
        again = Event("started", (dataclasses.replace(plan, resumed=known),))
        for told in (events[:half], (again, *events[1:])):
            reporter = make()
            reporter.open(Destination(tmp_path / "run"))
            for event in told:
                event.tell(reporter)
            reporter.close()

    @pytest.mark.parametrize("seed", range(2))
    def test_events_may_come_in_any_order(
        self, make: Callable[[], Reporter], events: tuple[Event, ...], tmp_path: Path, seed: int
    ) -> None:
        reporter = make()
        reporter.open(Destination(tmp_path / "run"))
        events[0].tell(reporter)
        for place in np.random.default_rng(seed).permutation(len(events) - 1):
            events[1 + place].tell(reporter)
        reporter.close()

    @pytest.mark.parametrize("told", [0, 1, 7])
    def test_it_closes_at_any_moment_and_more_than_once(
        self, make: Callable[[], Reporter], events: tuple[Event, ...], tmp_path: Path, told: int
    ) -> None:
        reporter = make()
        if told:
            reporter.open(Destination(tmp_path / "run"))
        for event in events[:told]:
            event.tell(reporter)
        reporter.close()
        reporter.close()

    def test_building_and_opening_it_writes_nothing(self, make: Callable[[], Reporter], tmp_path: Path) -> None:
        make().open(Destination(tmp_path / "run"))
        assert list(tmp_path.iterdir()) == []

    def test_failing_to_write_loses_no_measurement(self, make: Callable[[], Reporter], tmp_path: Path) -> None:
        """An essential reporter ends the search with advice, another one is left behind; the journal has it all."""
        whole = small_search(tmp_path / "whole", _Listener())
        (tmp_path / "file").write_text("")
        reporter = make()
        listener = _Listener()
        both = Reporters([listener, reporter])
        both.open(Destination(tmp_path / "file" / "run"))
        try:
            small_search(tmp_path / "run", both)
        except QratkError:
            assert reporter.essential, "only an essential reporter may end a search"
        both.close()
        told = [event.arguments[0] for event in listener.events if event.name == "evaluated"]
        assert read_journal(tmp_path / "run" / files.JOURNAL).records[: len(told)] == tuple(told)
        assert small_search(tmp_path / "run", _Listener()).records == whole.records
