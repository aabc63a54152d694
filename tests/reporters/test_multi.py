from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
from example_search import example_search, opened, play

from qratk.core import RunDirectoryError
from qratk.core.result import GenerationSummary, Progress, Record, RefinementSummary, SearchPlan, SearchResult
from qratk.core.work import Work
from qratk.reporters.base import Destination, Reporter
from qratk.reporters.files import RunFiles
from qratk.reporters.multi import Reporters
from qratk.reporters.standard import standard_reporters


class _Noted(Reporter):
    """Notes what it is told, and fails at one of the calls."""

    speaks = True

    def __init__(self, fails_at: str = "") -> None:
        self.calls: list[str] = []
        self.messages: list[str] = []
        self.fails_at = fails_at

    def _note(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fails_at:
            raise OSError(28, "No space left on device")

    def open(self, destination: Destination) -> None:
        self._destination = destination

    def started(self, plan: SearchPlan) -> None:
        self._note("started")

    def message(self, text: str) -> None:
        self.messages.append(text)
        self._note("message")

    def working(self, work: Work) -> None:
        self._note("working")

    def progress(self, progress: Progress) -> None:
        self._note("progress")

    def evaluated(self, record: Record, progress: Progress) -> None:
        self._note("evaluated")

    def generation(self, summary: GenerationSummary) -> None:
        self._note("generation")

    def refinement(self, summary: RefinementSummary) -> None:
        self._note("refinement")

    def finished(self, result: SearchResult) -> None:
        self._note("finished")

    def close(self) -> None:
        self._note("close")


class _Needed(_Noted):
    essential = True


@pytest.fixture(scope="module")
def result() -> SearchResult:
    return example_search(generations=1)


def test_all_reporters_are_told_the_same(result: SearchResult) -> None:
    alone, first, second = _Noted(), _Noted(), _Noted()
    play(alone, result)
    play(Reporters([first, second]), result)
    assert alone.calls == first.calls == second.calls
    assert alone.calls.count("evaluated") == len(result.records)


@pytest.mark.parametrize("call", ["started", "evaluated", "generation", "refinement", "finished"])
def test_failing_reporter_is_closed_and_dropped_with_one_warning_to_the_others(call: str, result: SearchResult) -> None:
    bad, good = _Noted(call), _Noted()
    play(Reporters([bad, good]), result)
    assert bad.calls.count(call) == 1
    assert bad.calls[-1] == "close"
    warnings = [text for text in good.messages if "switched off" in text]
    assert len(warnings) == 1
    assert "No space left on device" in warnings[0]
    assert good.calls.count("finished") == 1


def test_all_reporters_may_fail_at_the_warning_itself(result: SearchResult, caplog: pytest.LogCaptureFixture) -> None:
    reporters = Reporters([_Noted("evaluated"), _Noted("message"), _Noted("message")])
    with caplog.at_level(logging.WARNING, "qratk"):
        play(reporters, result)
    assert reporters.alive == ()
    assert "switched off" in caplog.text


def test_failure_of_the_only_reporter_that_speaks_is_logged(
    tmp_path: Path, result: SearchResult, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "qratk"):
        play(Reporters([opened(RunFiles(), tmp_path), _Noted("generation")]), result)
    assert caplog.text.count("switched off") == 1


def test_error_of_an_essential_reporter_ends_the_search(result: SearchResult) -> None:
    with pytest.raises(OSError, match="No space left"):
        play(Reporters([_Needed("generation"), _Noted()]), result)


def test_all_are_closed_even_if_one_cannot_be(result: SearchResult) -> None:
    needed, other = _Needed("close"), _Noted()
    reporters = Reporters([needed, _Noted("close"), other])
    with pytest.raises(OSError, match="No space left"):
        reporters.close()
    assert other.calls == ["close"]


def test_run_files_on_a_bad_folder_end_the_search_with_advice(tmp_path: Path, result: SearchResult) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="Free space on that disk"):
        play(Reporters([opened(RunFiles(), tmp_path / "file" / "run")]), result)


def test_standard_reporters_write_all_files_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reporters = standard_reporters(tmp_path, fit_config={"model": {"name": "tiny"}}, plain=True, tensorboard=False)
    play(reporters, example_search(generations=1))
    reporters.close()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "evaluations.csv", "front.json", "best.yaml", "result.json", "front.png", "allocation.png", "progress.png",
    }  # fmt: skip
    assert "evaluations.csv, front.json, best.yaml, result.json, front.png" in capsys.readouterr().out


def test_reporters_are_imported_without_torch_matplotlib_and_rich() -> None:
    code = (
        "import sys, qratk.reporters.standard; "
        "print([m for m in ('torch', 'matplotlib', 'rich', 'tensorboard') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
