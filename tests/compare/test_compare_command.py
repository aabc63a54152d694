"""The compare command: arguments, running, resuming, and one comparison from end to end."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import yaml

from qratk.__main__ import main
from qratk.cli.search import search
from qratk.compare.grid import Grid
from qratk.compare.progress import CellProgress
from qratk.compare.run import run_grid
from qratk.compare.worker import Answer

SEARCH = {
    "name": "full", "evaluator": {"class_path": "qratk.testing.toy.ToyEvaluator", "init_args": {"num_layers": 4}},
    "like": [4, 8], "steps": [10, 30], "generations": 1, "refiner": "none", "surrogate": "none",
    "searcher": {"class_path": "nsga2", "init_args": {"population": 4, "offspring": 3}},
}  # fmt: skip


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A base on the toy evaluator and two recipes, in the working directory."""
    monkeypatch.chdir(tmp_path)
    base = {"model": {"model": "embedded"}, "data": {"class_path": "EmbeddedData"}, "search": SEARCH}
    recipes = {
        "base": base,
        "random": {"search": {"searcher": {"class_path": "random", "init_args": {"offspring": 3}}}},
        "broken": {"search": {"stepz": 3}},
    }
    for name, document in recipes.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(document))
    return tmp_path


class FakePool:
    """Answers as it is told, and leaves a result where a search succeeds."""

    def __init__(self, answers):
        self.answers = list(answers)
        self.ran: list[str] = []

    def __call__(self, jobs, target, *, environment):
        self.jobs, self.environment = jobs, environment
        return self

    def run(self, tasks):
        for number, (task, answer) in enumerate(zip(tasks, self.answers, strict=False)):
            folder = Path(task.arguments[-1])
            self.ran.append("/".join(folder.parts[-3:]))
            if not answer.reason:
                (folder / "result.json").write_text("{}")
            yield number, answer


def grid(files, *recipes, seeds=(0,)):
    return Grid.of(files / "out", [files / "base.yaml"], [files / f"{name}.yaml" for name in recipes], [], seeds)


def test_finished_cells_are_left_alone_and_failed_ones_are_tried_again(files):
    pool = FakePool([Answer(), Answer("it broke")])
    run_grid(grid(files, "random"), search, make_pool=pool)
    assert pool.ran == ["full/own/0", "random/own/0"]
    failure = files / "out" / "random" / "own" / "0" / "failure.json"
    assert json.loads(failure.read_text()) == {"reason": "it broke"}
    again = FakePool([Answer()])
    run_grid(grid(files, "random"), search, make_pool=again)
    assert again.ran == ["random/own/0"]
    assert not failure.exists()


def test_search_without_a_result_has_failed(files):
    class Silent(FakePool):
        def run(self, tasks):
            yield 0, Answer()

    run_grid(grid(files), search, make_pool=Silent([]))
    failure = files / "out" / "full" / "own" / "0" / "failure.json"
    assert "without a result" in failure.read_text()


def test_several_jobs_get_one_thread_each(files):
    pool = FakePool([Answer(), Answer()])
    run_grid(grid(files, "random"), search, jobs=5, make_pool=pool)
    assert pool.jobs == 2
    assert pool.environment["OMP_NUM_THREADS"] == "1"
    alone = FakePool([Answer()])
    run_grid(grid(files, "random", seeds=(1,)), search, jobs=1, make_pool=alone)
    assert "OMP_NUM_THREADS" not in alone.environment


def test_interrupt_ends_with_the_command_that_goes_on(files, monkeypatch, capsys):
    def interrupted(grid, search, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("qratk.cli.compare.run_grid", interrupted)
    arguments = ["--config", "base.yaml", "--seeds", "0", "1", "--budgets", "[4, 8]", "--run_dir", "out"]
    assert main(["compare", *arguments]) == 130
    goes_on = "qratk compare --config base.yaml --seeds 0 1 --budgets '[4, 8]' --run_dir out"
    assert f"interrupted; to go on: {goes_on}" in capsys.readouterr().err


def test_interrupted_worker_ends_the_comparison(files):
    with pytest.raises(KeyboardInterrupt):
        run_grid(grid(files), search, make_pool=FakePool([Answer("interrupted", interrupted=True)]))
    assert not (files / "out" / "full" / "own" / "0" / "failure.json").exists()


def test_progress_tells_counts_and_time_left(capsys):
    now = [0.0]
    shown = CellProgress(4, 2, 1, stream=sys.stdout, clock=lambda: now[0])
    with shown:
        now[0] = 10.0
        shown.ended("a", "")
        now[0] = 20.0
        shown.ended("b", "out of memory")
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "[3 of 6 cells, 30.0 s left] a: done",
        "[4 of 6 cells; 1 failed, 20.0 s left] b: failed: out of memory",
    ]


def test_cells_that_run_for_long_tell_where_they_are(tmp_path, capsys):
    (tmp_path / "log.txt").write_text("loading\n[2 s] 3/54 baseline\rscoring: 1/3\n\n")
    logs = {"a": tmp_path / "log.txt", "b": tmp_path / "not begun" / "log.txt", "c": tmp_path / "log.txt"}
    with CellProgress(3, 1, 1, logs=logs, every=0.01, stream=sys.stdout) as shown:
        shown.ended("c", "")
        deadline = time.monotonic() + 10
        lines = []
        while not any("] a: " in line for line in lines) and time.monotonic() < deadline:
            time.sleep(0.01)
            lines += capsys.readouterr().out.splitlines()
    lines = [line for line in lines if "] c: done" not in line]
    assert "[2 of 4 cells] a: scoring: 1/3" in lines
    assert not any("] b: " in line for line in lines)


def test_dry_run_prints_the_searches_and_runs_none(files, capsys):
    arguments = ["--config", "base.yaml", "--recipes", "random.yaml", "--seeds", "0", "--run_dir", "out", "--dry_run"]
    assert main(["compare", *arguments, "--search.generations=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == (
        "new       qratk search --config base.yaml --search.generations=2 --config random.yaml --seed_everything=0 "
        "--model.seed=0 --data.seed=0 --search.seed=0 --run_dir out/random/own/0"
    )
    assert lines[2] == "2 cells: 2 new"
    assert not (files / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--run_dir", "out"], "--config is needed"),
        (["--config", "base.yaml", "--run_dir", "out", "--recipees", "x"], "unknown argument '--recipees'"),
        (["--config", "base.yaml", "--run_dir", "out", "--jobs", "0"], "--jobs must be at least 1"),
        (["--config", "base.yaml", "--run_dir", "out", "--runs", "0.5"], "--runs must be at least 1, got 0.5"),
        (["--config", "base.yaml", "--run_dir", "out", "--reference", "x"], "--reference x: there is no such recipe"),
        (["--config", "base.yaml"], "--run_dir"),
    ],
)
def test_wrong_arguments_are_told(files, capsys, arguments, text):
    with pytest.raises(SystemExit) as stop:
        main(["compare", *arguments])
    assert stop.value.code == 2
    assert text in capsys.readouterr().err


def test_missing_recipe_is_one_line(files, capsys):
    assert main(["compare", "--config", "base.yaml", "--recipes", "nowhere.yaml", "--run_dir", "out"]) == 1
    assert capsys.readouterr().err.startswith("qratk: error: nowhere.yaml cannot be read")


def test_comparison_from_end_to_end(files, capsys):
    """One story: two recipes run in processes of their own, one fails, the report follows, and nothing runs twice."""
    arguments = ["--config", "base.yaml", "--recipes", "random.yaml", "broken.yaml", "--seeds", "0"]
    assert main(["compare", *arguments, "--budgets", "[4, 16]", "--run_dir", "out", "--no_figures"]) == 1
    assert "Did you mean 'search.steps'?" in capsys.readouterr().out
    cell = files / "out" / "random" / "like-4-16" / "0"
    assert "best score" in (cell / "log.txt").read_text()
    assert not (cell / "tensorboard").exists()
    assert not (cell / "front.png").exists()
    settings = yaml.safe_load((cell / "config.yaml").read_text())["search"]
    assert (settings["like"], settings["seed"], settings["searcher"]["init_args"]["offspring"]) == ([4, 16], 0, 3)
    before = (cell / "result.json").stat().st_mtime_ns
    assert main(["compare", "--only_report", "--run_dir", "out", "--no_figures"]) == 1
    assert (cell / "result.json").stat().st_mtime_ns == before
