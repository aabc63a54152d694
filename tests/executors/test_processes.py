"""Searches whose evaluations happen in processes: equal to serial ones, whoever is killed."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from qratk.core import ConfigurationError, Evaluation, Request, SearchError
from qratk.core.result import SearchResult
from qratk.executors.processes import Processes
from qratk.reporters.multi import Reporters
from qratk.run.journal import Journal
from qratk.settings.recipe import autoqra
from qratk.testing import ToyEvaluator


class OneByOne(ToyEvaluator):
    """Groups of two, so that several workers have something to do; ends its process where it is told to.

    Args:
        folder: files in it name what was already done once.
        dies: score above which the process of a configuration is killed, once or for ever.
        seconds: what an evaluation takes.
    """

    def __init__(self, folder: Path, dies: float = 1e9, *, for_ever: bool = False, seconds: float = 0.0) -> None:
        super().__init__(num_layers=4, failures=0.1)
        self.folder, self.dies, self.for_ever, self.pause = folder, dies, for_ever, seconds

    def groups(self, requests: Sequence[Request]) -> Iterator[Sequence[Request]]:
        return (requests[start : start + 2] for start in range(0, len(requests), 2))

    def evaluate(self, group: Sequence[Request]) -> Sequence[Evaluation]:
        found = super().evaluate(group)
        for evaluation in found:
            time.sleep(self.pause)
            mark = self.folder / f"{evaluation.configuration.digest}-{evaluation.steps}"
            if evaluation.score > self.dies and (self.for_ever or not mark.exists()):
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return found


def search(run_dir: Path, evaluator: ToyEvaluator, executor: Any = "serial", **changes: Any) -> SearchResult:
    settings: dict[str, Any] = {
        "evaluator": evaluator,
        "searcher": {"nsga2": {"offspring": 8, "population": 12}},
        "refiner": "hill_climb",
        "like": (4, 16),
        "generations": 2,
        "hypervolume_tolerance": -1.0,
        "references": [[16, 16], [2, 2]],
        "executor": executor,
    }
    loop = autoqra(**{**settings, **changes})
    return loop.run(run_dir=run_dir, reporter=Reporters([]), config={})


def outcome(result: SearchResult) -> dict[str, Any]:
    """All of a result but the order in which its evaluations ended."""
    return {
        "evaluations": list(result.history),
        "candidates": [record.candidate for record in result.records],
        "best": result.best,
        "references": result.references,
        "tests": result.test_scores,
        "stops": result.stop_reasons,
        "volumes": [generation.hypervolume for generation in result.generations],
    }


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("serial")
    return outcome(search(folder / "run", OneByOne(folder)))


def test_processes_find_what_one_after_another_finds_and_a_killed_worker_costs_nothing(
    tmp_path: Path, serial: dict[str, Any]
) -> None:
    best = serial["best"].score
    result = search(tmp_path / "run", OneByOne(tmp_path, best - 1e-9), {"processes": {"workers": 2}})
    assert outcome(result) == serial
    assert list(tmp_path.glob("*-900")), "no worker was killed"


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_processes import OneByOne, search
if __name__ == "__main__":
    search(Path(sys.argv[2]), OneByOne(Path(sys.argv[2]), seconds=0.2), {"processes": {"workers": 2}})
"""


def test_a_killed_search_goes_on_under_another_executor_and_takes_its_workers_with_it(
    tmp_path: Path, serial: dict[str, Any]
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run_dir = tmp_path / "run"
    begun = subprocess.Popen([sys.executable, str(script), str(Path(__file__).parent), str(run_dir)])
    while begun.poll() is None and recorded(run_dir) < 6:
        time.sleep(0.05)
    children = Path(f"/proc/{begun.pid}/task/{begun.pid}/children").read_text().split()
    begun.kill()
    begun.wait()
    assert outcome(search(run_dir, OneByOne(tmp_path))) == serial
    assert children
    assert not any(measures(int(child)) for child in children)


def recorded(run_dir: Path) -> int:
    try:
        with sqlite3.connect(run_dir / "journal.sqlite") as database:
            return int(database.execute("SELECT count(*) FROM evaluations").fetchone()[0])
    except sqlite3.OperationalError:
        return 0


def measures(process: int) -> bool:
    try:
        return "multiprocessing" in Path(f"/proc/{process}/cmdline").read_text()
    except OSError:
        return False


def test_a_group_that_kills_its_process_each_time_is_lost_with_the_reason_and_tried_again_on_resume(
    tmp_path: Path, serial: dict[str, Any]
) -> None:
    best = serial["best"].score
    changes: dict[str, Any] = {"refiner": "none", "generations": 1, "references": [], "test": False}
    first = search(
        tmp_path / "run",
        OneByOne(tmp_path, best - 0.1, for_ever=True),
        {"processes": {"workers": 2, "attempts": 2}},
        **changes,
    )
    lost = [e for e in first.history if e.status == "lost"]
    assert lost
    assert all(e.reason == "its process was killed by SIGKILL; out of memory? (2 attempts)" for e in lost)
    again = search(tmp_path / "run", OneByOne(tmp_path), **changes)
    assert all(e.status != "lost" for e in again.history)


class Broken(ToyEvaluator):
    """Cannot measure anything."""

    def evaluate(self, group: Sequence[Request]) -> Sequence[Evaluation]:
        raise SearchError("it is broken")


class UnmailableError(Exception):
    """Is not made again from its arguments, or holds what cannot be sent."""

    def __init__(self, disk: str, *, held: Callable[[], None] | None) -> None:
        super().__init__(f"the disk {disk} is full")
        self.held = held


class Unheard(ToyEvaluator):
    """Fails by an error that does not survive the way to another process.

    Args:
        held: whether the error holds what cannot be sent; else it is not made again where it arrives.
    """

    def __init__(self, *, held: bool) -> None:
        super().__init__(num_layers=4)
        self.held = held

    def evaluate(self, group: Sequence[Request]) -> Sequence[Evaluation]:
        raise UnmailableError("sda", held=(lambda: None) if self.held else None)


def test_what_a_worker_raises_is_raised_with_its_trace(tmp_path: Path) -> None:
    with pytest.raises(SearchError, match="it is broken") as raised:
        search(tmp_path, Broken(num_layers=4), {"processes": {"workers": 1}})
    assert any("in evaluate" in note for note in raised.value.__notes__)


@pytest.mark.parametrize("held", [False, True])
def test_an_error_that_cannot_be_sent_is_told_in_its_own_words(tmp_path: Path, held: bool) -> None:
    with pytest.raises(SearchError, match="UnmailableError: the disk sda is full") as raised:
        search(tmp_path / "run", Unheard(held=held), Processes(workers=1))
    assert any("in evaluate" in note for note in raised.value.__notes__)


def test_objects_that_cannot_be_built_elsewhere_are_refused_before_anything_is_measured(tmp_path: Path) -> None:
    evaluator = ToyEvaluator(num_layers=4)
    evaluator.hidden = lambda: None  # type: ignore[attr-defined]
    with pytest.raises(ConfigurationError, match="qratk search"):
        search(tmp_path, evaluator, "processes")
    with Journal(tmp_path) as journal:
        assert journal.records == ()


@pytest.mark.parametrize("wrong", [{"workers": 0}, {"attempts": 0}, {"devices": [-1]}])
def test_numbers_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="workers and attempts"):
        Processes(**wrong)
