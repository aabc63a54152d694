"""A search on an lm-eval task: scored within it as lm-eval scores what came of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import qratk
from qratk.__main__ import main
from qratk.embedded.data import write_dataset

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # lm-eval's dependencies
]


@pytest.fixture
def document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    monkeypatch.chdir(tmp_path)
    files = {split: str(path) for split, path in write_dataset(tmp_path / "rows").items()}
    for path in files.values():
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()[:12]]
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = [
        {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm", "exact_match")
    ]
    task = {
        "task": "own_task", "output_type": "multiple_choice", "dataset_path": "json",
        "dataset_kwargs": {"data_files": files}, "training_split": "train", "validation_split": "validation",
        "test_split": "test", "num_fewshot": 1, "doc_to_text": "{{context}}\n{{question}}", "doc_to_choice": "choices",
        "doc_to_target": "label", "metric_list": metrics,
    }  # fmt: skip
    texts = {name: value for name, value in task.items() if name not in ("doc_to_choice", "num_fewshot")} | {
        "task": "own_texts", "output_type": "generate_until", "doc_to_target": "{{choices[label][:1]}}",
        "filter_list": [
            {"name": "first", "filter": [{"function": "regex", "regex_pattern": "([a-z])"}, {"function": "take_first"}]}
        ],
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6}, "metric_list": metrics[2:],
    }  # fmt: skip
    Path("tasks").mkdir()
    Path("tasks/own_texts.yaml").write_text(yaml.safe_dump(texts, sort_keys=False))
    Path("tasks/own_task.yaml").write_text(yaml.safe_dump(task, sort_keys=False))
    search = {
        "bits": [4], "ranks": [2, 4], "like": [4, 4], "steps": [1], "generations": 1, "high_fidelity_candidates": 1,
        "bits_importance": "uniform", "rank_importance": "uniform", "refiner": "none", "test": True,
        "reporters": ["files"], "searcher": {"class_path": "random", "init_args": {"offspring": 1}},
    }  # fmt: skip

    def data(name: str, **options: str) -> dict[str, Any]:
        return {"class_path": "LmEvalData", "init_args": {"task": name, "task_folders": ["tasks"], **options}}

    def tasks() -> dict[str, Any]:
        return {"choice": {"data": data("own_task"), "metric": "exact_match"}, "text": {"data": data("own_texts")}}

    suite = {"train": [{"data": data("own_task", train="train")}], "validation": tasks(), "test": tasks()}
    return {
        "model": {"model": "embedded", "learning_rate": 5e-3},
        "data": {"class_path": "SuiteData", "init_args": {**suite, "batch_size": 4}},
        "search": search,
    }


@pytest.mark.slow
def test_what_a_search_reports_is_what_lm_eval_says_of_its_answer(
    document: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("own.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    assert main(["search", "--config", "own.yaml", "--run_dir", "run"]) == 0
    run = qratk.Run.open("run")
    best = run.result.best
    assert best.figures["text/score"] == best.figures["text/exact_match,first"]
    assert best.score == pytest.approx((best.figures["choice/exact_match"] + best.figures["text/score"]) / 2)
    assert all(len(record.evaluation.outcomes) == 12 + 12 for record in run.records)
    capsys.readouterr()
    assert (
        main(
            [
                "test",
                "--config",
                "run/best.yaml",
                "--lm_eval.tasks=[own_task, own_texts]",
                "--lm_eval.task_folders=[tasks]",
            ]
        )
        == 0
    )
    told = capsys.readouterr().out
    theirs = yaml.safe_load(told[told.index("lm_eval:") :])["lm_eval"]
    assert set(theirs["own_task"]) == {"acc", "acc_norm", "exact_match"}
    assert set(theirs["own_texts"]) == {"exact_match,first"}
    for task, found in (("choice", theirs["own_task"]), ("text", theirs["own_texts"])):
        for name, value in found.items():
            (line,) = [line for line in told.splitlines() if f"test/{task}/{name} " in line]
            assert float(line.strip("│ ").split()[-1]) == pytest.approx(value, abs=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.. is deprecated.*")
@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
def test_lm_evals_own_command_says_the_same_of_the_exported_model(
    document: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    document["model"] |= {"configuration": "4:4", "compute_dtype": "float32"}
    Path("fit.yaml").write_text(yaml.safe_dump({name: document[name] for name in ("model", "data")}))
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    assert main(["fit", "--config", "fit.yaml", "--trainer.max_steps=3", "--trainer.default_root_dir=.", *quiet]) == 0
    (checkpoint,) = Path().rglob("*.ckpt")
    capsys.readouterr()
    assert main(["test", "--config", "fit.yaml", "--ckpt_path", str(checkpoint), *quiet]) == 0
    lines = [line.strip("│ ").split() for line in capsys.readouterr().out.splitlines() if "test/" in line]
    ours = {name.removeprefix("test/"): float(value) for name, *_, value in lines}
    assert main(["export", str(checkpoint), "--form", "dense", "--dtype", "float32", "merged"]) == 0
    done = subprocess.run(
        [
            sys.executable, "-W", "ignore", "-m", "lm_eval", "--model", "hf", "--model_args",
            "pretrained=merged,dtype=float32", "--tasks", "own_task,own_texts", "--include_path", "tasks",
            "--device", "cpu", "--batch_size", "4", "--output_path", "told",
        ],
        env={
            **os.environ, "HF_DATASETS_CACHE": str(Path("cache").resolve()), "HF_DATASETS_OFFLINE": "1",
            "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        },
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (told,) = Path("told").rglob("results_*.json")
    theirs = json.loads(told.read_text())["results"]
    compared = 0
    for task, found in (("choice", theirs["own_task"]), ("text", theirs["own_texts"])):
        for name, value in found.items():
            if "," in name and "_stderr" not in name:
                assert ours[f"{task}/{name.removesuffix(',none')}"] == pytest.approx(value, abs=1e-6), name
                compared += 1
    assert compared == 3 + 1
    assert 0 < ours["choice/acc"] < 1
    assert ours["score"] == pytest.approx((ours["choice/exact_match"] + ours["text/exact_match,first"]) / 2, abs=1e-6)
