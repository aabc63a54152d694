"""A run folder as one object, after the search has ended, and while it has not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from example_search import opened

from qratk.core import History, RunDirectoryError
from qratk.core.result import Progress, Record, SearchResult
from qratk.reporters.files import RunFiles
from qratk.reporters.multi import Reporters
from qratk.run import files
from qratk.run.journal import Journal
from qratk.run.run import Run
from qratk.settings.recipe import autoqra
from qratk.testing.toy import ToyEvaluator

SETTINGS = {
    "like": [4, 8], "steps": [10, 30], "generations": 2, "searcher": {"random": {"offspring": 6}}, "refiner": "none",
    "surrogate": "none", "references": [[8, 16]],
}  # fmt: skip


def stopping(folder: Path, after: int) -> Reporters:
    """Files of a run, and a search that is stopped after a number of evaluations, as by Ctrl-C."""
    reporters = Reporters([opened(RunFiles(), folder)])
    tell = reporters.evaluated

    def evaluated(record: Record, progress: Progress) -> None:
        tell(record, progress)
        if record.index + 1 == after:
            raise KeyboardInterrupt

    reporters.evaluated = evaluated  # type: ignore[method-assign]
    return reporters


def search(folder: Path, *, stop_after: int = 0) -> SearchResult:
    folder.mkdir()
    (folder / files.CONFIG).write_text(yaml.safe_dump({"search": SETTINGS}))
    loop = autoqra(evaluator=ToyEvaluator(4, 0), **SETTINGS)
    return loop.run(run_dir=folder, reporter=stopping(folder, stop_after), config={})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SearchResult]:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    return folder, search(folder)


def test_finished_run_holds_what_the_search_returned(finished: tuple[Path, SearchResult]) -> None:
    folder, result = finished
    run = Run.open(folder)
    assert run.finished
    assert run.records == result.records
    assert list(run.history) == list(result.history)
    assert run.best == result.best
    assert run.front == result.front.evaluations
    assert run.baselines == result.baselines
    assert run.result.best.configuration == result.best.configuration
    assert run.settings.section("search")["generations"] == 2


def test_reading_a_run_changes_nothing_in_its_folder(finished: tuple[Path, SearchResult]) -> None:
    folder, _ = finished
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    run = Run.open(folder)
    assert run.records
    assert run.best
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_interrupted_run_tells_what_was_found_so_far(tmp_path: Path, finished: tuple[Path, SearchResult]) -> None:
    _, whole = finished
    baselines = len(whole.baselines)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "run", stop_after=2 * baselines + 12)
    run = Run.open(tmp_path / "run")
    assert not run.finished
    assert len(run.records) >= 2 * baselines + 12
    assert run.records == whole.records[: len(run.records)]
    assert run.baselines == whole.baselines
    assert run.best is not None
    assert run.best in History(r.evaluation for r in run.records)
    assert run.front
    with pytest.raises(RunDirectoryError, match=r"result\.json is missing: .* holds no finished search"):
        _ = run.result


def test_run_without_a_generation_has_no_front_and_no_best_yet(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "run", stop_after=3)
    run = Run.open(tmp_path / "run")
    assert len(run.records) == 3
    assert (run.front, run.best) == ((), None)


def test_running_search_can_be_opened(tmp_path: Path, finished: tuple[Path, SearchResult]) -> None:
    first = finished[1].records[0]
    with Journal(tmp_path) as journal:
        journal.append(first.candidate, first.evaluation)
        assert Run.open(tmp_path).records == (first,)


def test_checkpoint_is_a_folder_that_was_kept(tmp_path: Path, finished: tuple[Path, SearchResult]) -> None:
    from dataclasses import replace

    best = replace(finished[1].best, checkpoint="checkpoints/abc/30")
    assert Run(tmp_path).checkpoint(best) is None
    (tmp_path / "checkpoints" / "abc" / "30").mkdir(parents=True)
    assert Run(tmp_path).checkpoint(best) == tmp_path / "checkpoints" / "abc" / "30"


def test_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(RunDirectoryError, match="holds no run"):
            Run.open(folder)


def test_result_of_another_run_is_refused(tmp_path: Path, finished: tuple[Path, SearchResult]) -> None:
    shutil.copytree(finished[0], tmp_path / "run")
    path = tmp_path / "run" / files.RESULT
    score = repr(finished[1].best.score)
    path.write_text(path.read_text().replace(score, "0.123"))
    with pytest.raises(RunDirectoryError, match=r"result\.json and journal\.sqlite differ"):
        _ = Run.open(tmp_path / "run").best


def test_missing_settings_are_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match=r"config\.yaml is missing"):
        _ = Run(tmp_path).settings
