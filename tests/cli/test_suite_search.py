"""A search over a mixture, judged by a suite: every place that a score or a figure of it goes to."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import qratk
from qratk import EmbeddedData, FineTuneModule, InstructionData, MultipleChoiceData, SuiteData
from qratk.__main__ import main
from qratk.embedded.data import write_dataset

pytestmark = pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
SEARCH: dict[str, Any] = {
    "bits": [4], "ranks": [2, 4], "like": [4, 4], "steps": [1, 2], "generations": 1, "high_fidelity_candidates": 1,
    "bits_importance": "uniform", "rank_importance": "uniform", "refiner": "none",
    "reporters": ["files", "terminal"], "test": True,
}  # fmt: skip


@pytest.fixture(autouse=True)
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def document(tmp_path: Path) -> dict[str, Any]:
    files = {split: str(path) for split, path in write_dataset(tmp_path / "rows").items()}
    rows = [json.loads(line) for line in Path(files["train"]).read_text().splitlines()[:40]]
    answers = [{"instruction": row["question"], "output": row["choices"][row["label"]]} for row in rows]
    for name, part in (("learnt", answers[:30]), ("held", answers[25:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))

    def member(kind: str, **options: str) -> dict[str, Any]:
        return {"class_path": kind, "init_args": options}

    data = {
        "train": [
            {"data": member("MultipleChoiceData", train=files["train"]), "weight": 1, "items": 50},
            {"data": member("InstructionData", train="learnt.jsonl", template="plain"), "weight": 0.5},
        ],
        "validation": {
            "choice": {
                "data": member("MultipleChoiceData", validation=files["validation"]),
                "items": 6,
                "metric": "acc",
            },
            "answer": {"data": member("InstructionData", validation="held.jsonl", template="plain"), "items": [2, 4]},
        },
        "test": {"choice": {"data": member("MultipleChoiceData", test=files["test"]), "items": 5}},
        "batch_size": 4,
    }
    searcher = {"class_path": "random", "init_args": {"offspring": 1}}
    return {
        "model": {"model": "embedded", "learning_rate": 5e-3},
        "data": {"class_path": "SuiteData", "init_args": data},
        "search": {**SEARCH, "searcher": searcher},
    }


def test_figures_of_a_suite_go_where_figures_go(document: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    Path("suite.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    assert main(["search", "--config", "suite.yaml", "--run_dir", "run"]) == 0
    run = qratk.Run.open("run")
    best = run.result.best
    tasks = {name: best.figures[f"{name}/score"] for name in ("choice", "answer")}
    assert tasks == {"choice": best.figures["choice/acc"], "answer": best.figures["answer/token_prob"]}
    assert best.score == pytest.approx(sum(tasks.values()) / 2)
    shown = " ".join(capsys.readouterr().out.split())
    assert f"best figures: choice/score {tasks['choice']:.4f}, answer/score " in shown
    with open("run/evaluations.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(run.records) > 3
    for line, record in zip(lines, run.records, strict=True):
        assert float(line["answer/token_prob"]) == record.evaluation.figures["answer/token_prob"]
        outcomes = record.evaluation.outcomes
        assert len(outcomes) == {1: 6 + 2, 2: 6 + 4}[record.evaluation.steps]  # fewer answers at the lower rung
        means = sum(outcomes[:6]) / 6, sum(outcomes[6:]) / len(outcomes[6:])
        assert sum(means) / 2 == pytest.approx(record.evaluation.score)
    tested = run.result.tested(best)
    assert tested["score"] == tested["choice/score"] == tested["choice/prob_per_token"]
    saved = yaml.safe_load(Path("run/config.yaml").read_text())["data"]
    assert saved["init_args"]["train"][1]["data"]["class_path"] == "InstructionData"

    assert main(["plan", "--config", "suite.yaml", "--run_dir", "run"]) == 0
    planned = capsys.readouterr().out
    assert "score        at 2 steps: standard error 0." in planned
    assert ", by scorings in the run folder" in planned
    assert "(6 items), answer 0." in planned
    assert "score        at 1 steps" in planned

    # The call from Python is the same search.
    given = document["data"]["init_args"]
    kinds = {"MultipleChoiceData": MultipleChoiceData, "InstructionData": InstructionData}

    def built(part: dict[str, Any]) -> dict[str, Any]:
        return {**part, "data": kinds[part["data"]["class_path"]](**part["data"]["init_args"])}

    data = SuiteData(
        [built(part) for part in given["train"]],
        **{split: {name: built(task) for name, task in given[split].items()} for split in ("validation", "test")},
        batch_size=4,
    )
    module = FineTuneModule("embedded", learning_rate=5e-3)
    result = qratk.search(module, data, run_dir="run", **{**SEARCH, "searcher": {"random": {"offspring": 1}}})
    assert result.best.score == best.score


@pytest.mark.slow
def test_other_commands_take_a_suite(document: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    document["model"] = {"model": "embedded", "configuration": "4:2"}
    Path("suite.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    arguments = ["--config", "suite.yaml", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    assert main(["test", *arguments]) == 0
    assert "test/choice/prob_per_token" in capsys.readouterr().out
    assert main(["predict", *arguments]) == 0
    lines = [json.loads(line) for line in Path("predictions.jsonl").read_text().splitlines()]
    assert [line["item"] for line in lines] == [index // 4 for index in range(20)]
    assert main(["fit", *arguments, "--trainer.max_steps=1"]) == 0
    assert "validation/answer/score" in capsys.readouterr().out


def test_a_mistake_in_a_suite_is_one_message(document: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    document["data"]["init_args"]["validation"]["choice"]["metric"] = "acc_nrom"
    Path("suite.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    assert main(["test", "--config", "suite.yaml"]) != 0
    (line,) = capsys.readouterr().err.splitlines()[:1]
    assert "suite.yaml:" in line
    assert "validation.choice: metric must be one of acc, acc_norm" in line
    assert line.endswith("Did you mean 'acc_norm'?")


def test_embedded_data_can_be_members() -> None:
    data = SuiteData([{"data": EmbeddedData()}], validation={"facts": {"data": EmbeddedData(data_seed=1), "items": 9}})
    assert data.strata() == (("facts", 9),)
    assert len(data.items("train")) > 100
