"""A search from Python: README's lines, the run folder that the command would make, and going on with it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import qratk
from qratk import EmbeddedData, FineTuneModule, InstructionData, RunDirectoryError, SearchResult, TextData
from qratk.__main__ import main
from qratk.searchers.random import RandomSearch
from qratk.testing import ToyEvaluator

README = (Path(qratk.__file__).parents[1] / "README.md").read_text()
REFINER = {"trust_region": {"max_evaluations": 1, "pool_size": 20}}
SIMULATED = f'evaluator={{"simulated": {{"num_layers": 4}}}}, reporters=["files"], refiner={REFINER}'
pytestmark = pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")


@pytest.fixture(autouse=True)
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def called(run_dir: str = "run", **settings: Any) -> SearchResult:
    defaults = {
        "evaluator": {"simulated": {"num_layers": 4}}, "reporters": ["files"], "like": (4, 8), "generations": 1,
        "refiner": REFINER,
    }  # fmt: skip
    data = EmbeddedData(batch_size=8)
    return qratk.search(FineTuneModule("embedded"), data, run_dir=run_dir, **{**defaults, **settings})


def outcomes(result: SearchResult) -> list[tuple[str, int, float]]:
    return [(str(r.evaluation.configuration), r.evaluation.steps, r.evaluation.score) for r in result.records]


def test_readmes_lines_run_and_the_command_repeats_them() -> None:
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "qratk.search(" in b]
    assert len(block.replace("\n\n", "\n").splitlines()) == 10
    names: dict[str, Any] = {}
    exec(block.replace("like=", f"{SIMULATED}, like="), names)
    run = qratk.Run.open("runs/from-python")
    assert run.result.best.score == names["result"].best.score
    assert run.settings.document["search"]["like"] == [4, 8]
    command = ["search", "--config", "runs/from-python/config.yaml", "--run_dir", "again"]
    assert main([*command, "--search.reporters=[files]"]) == 0
    assert [r.evaluation for r in qratk.Run.open("again").records] == [r.evaluation for r in run.records]
    assert main(["search", "--config", "again/config.yaml", "--run_dir", "runs/from-python"]) == 0


def test_same_call_goes_on_and_another_is_refused() -> None:
    first = called(trainer={"gradient_clip_val": 1.0})
    assert outcomes(called(trainer={"gradient_clip_val": 1.0})) == outcomes(first)
    with pytest.raises(RunDirectoryError, match="gradient_clip_val"):
        called(trainer={"gradient_clip_val": 2.0})
    with pytest.raises(RunDirectoryError, match="generations"):
        called(trainer={"gradient_clip_val": 1.0}, generations=2)


def test_objects_are_written_by_name_and_options() -> None:
    called(searcher=RandomSearch(offspring=5), refiner="none")
    written = yaml.safe_load(Path("run/config.yaml").read_text())
    assert written["search"]["searcher"]["class_path"] == "random"
    assert written["search"]["searcher"]["init_args"]["offspring"] == 5
    assert written["data"]["class_path"] == "EmbeddedData"
    assert written["data"]["init_args"]["batch_size"] == 8
    assert written["model"]["model"] == "embedded"


def test_what_no_file_can_hold_is_searched_all_the_same() -> None:
    first = called(evaluator=ToyEvaluator(4, seed=1))
    assert not Path("run/config.yaml").exists()
    assert outcomes(called(evaluator=ToyEvaluator(4, seed=1))) == outcomes(first)


def test_secrets_of_a_call_are_in_no_file_of_the_run(tmp_path: Path) -> None:
    module = FineTuneModule("https://me:8675309@host/x")
    evaluator, like = ToyEvaluator(4, seed=1), (4, 8)
    small: dict[str, Any] = {"generations": 1, "refiner": REFINER}
    qratk.search(module, EmbeddedData(), run_dir="run", reporters=["files"], evaluator=evaluator, like=like, **small)
    holding = [path for path in tmp_path.rglob("*") if path.is_file() and b"8675309" in path.read_bytes()]
    assert holding == []


@pytest.mark.slow
def test_processes_build_what_the_call_was_given() -> None:
    alone = called()
    side_by_side = called("other", executor={"processes": {"workers": 1}})
    assert outcomes(side_by_side) == outcomes(alone)


@pytest.mark.parametrize("kind", [TextData, InstructionData])
def test_data_tell_the_arguments_that_they_were_given(kind: type[qratk.TaskData]) -> None:
    data = kind("rows.jsonl", batch_size=3, max_length=64)
    assert {key: data.arguments[key] for key in ("train", "batch_size", "max_length", "seed")} == {
        "train": "rows.jsonl", "batch_size": 3, "max_length": 64, "seed": 0,
    }  # fmt: skip
    again = kind(**data.arguments)
    assert again.arguments == data.arguments
