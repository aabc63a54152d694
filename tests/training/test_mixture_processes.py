"""A mixture trained on, and a suite scored, by two processes: each row once an epoch, and the scores of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

SCRIPT = """
import json, sys, warnings
import torch
from lightning import Callback, Trainer
from qratk.data import InstructionData, LmEvalData, MultipleChoiceData, SuiteData
from tiny_runs import QUIET, Files, make_module
torch.set_num_threads(1)
warnings.simplefilter("ignore")
given = json.loads(sys.argv[1])
files = given["files"]

class Seen(Callback):
    def __init__(self):
        self.rows = []
    def on_train_batch_start(self, trainer, module, batch, number):
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            self.rows.append(data.tokenizer.decode(ids[mask > 0], skip_special_tokens=True))

choices = MultipleChoiceData(files["choices"], score="acc")
answers = InstructionData(files["answers"], template="plain")
weights = given["weights"]
data = SuiteData(
    [{"data": choices, "weight": weights and weights[0]}, {"data": answers, "weight": weights and weights[1]}],
    validation={
        "choices": {"data": MultipleChoiceData(validation=files["scored"])},
        "answers": {"data": InstructionData(validation=files["answered"], template="plain"), "weight": 2},
        "texts": {"data": LmEvalData("texts", task_folders=[files["tasks"]], test=None)},
    },
    batch_size=2,
)
module = make_module(Files(given["model"], {}), learning_rate=1e-3)
seen = Seen()
options = {**QUIET, "max_epochs": given["epochs"], "accelerator": "cpu", "devices": given["devices"]}
if given["devices"] > 1:
    options["strategy"] = "ddp"
trainer = Trainer(callbacks=[seen], limit_val_batches=0, **options)
trainer.fit(module, datamodule=data)
rank = trainer.global_rank
if given["score"]:
    module = make_module(Files(given["model"], {}))  # as it is: training on two and on one differ by rounding
    (figures,) = Trainer(**options).validate(module, datamodule=data, verbose=False)
    outcomes = module.last_outcomes
else:
    figures, outcomes = {}, ()
with open(f"{given['out']}/{rank}.json", "w") as file:
    json.dump({"rows": seen.rows, "figures": figures, "outcomes": outcomes}, file)
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Ten choices and six answers to train on; three choices, five answers and three texts to be judged by."""
    folder = tmp_path_factory.mktemp("rows")
    choices = [{"question": f"{n}+{n}=", "choices": ["one", "two"], "label": n % 2} for n in range(13)]
    answers = [{"instruction": f"say {n}", "output": f"it is {n}"} for n in range(11)]
    texts = [{"question": f"count {n}", "answer": "a"} for n in range(3)]
    parts = {
        "choices": choices[:10], "scored": choices[10:], "answers": answers[:6], "answered": answers[6:], "texts": texts
    }  # fmt: skip
    for name, rows in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "texts", "dataset_path": "json", "validation_split": "validation", "output_type": "generate_until",
        "dataset_kwargs": {"data_files": {"validation": str(folder / "texts.jsonl")}}, "doc_to_text": "{{question}}",
        "doc_to_target": "answer", "generation_kwargs": {"until": ["."], "max_gen_toks": 5},
        "metric_list": [{"metric": "share", "aggregation": "mean", "higher_is_better": True}],
        "process_results": "!share",
    }  # fmt: skip
    (folder / "tasks").mkdir()
    (folder / "tasks" / "functions.py").write_text(
        "def share(doc, results):\n    return {'share': (sum(map(ord, results[0])) + len(doc['question'])) % 11 / 11}\n"
    )
    text = yaml.safe_dump(task).replace("'!share'", "!function functions.share")
    (folder / "tasks" / "texts.yaml").write_text(text)
    return {name: str(folder / f"{name}.jsonl") for name in parts} | {"tasks": str(folder / "tasks")}


def run(model: Path, files: dict[str, str], out: Path, devices: int, **options: Any) -> list[dict[str, Any]]:
    """What each process tells: the rows that it saw, figures and outcomes."""
    out.mkdir()
    script = out / "run.py"  # Lightning starts the second process by the file that the first one runs
    script.write_text(SCRIPT)
    given = {"model": str(model), "files": files, "out": str(out), "devices": devices, "epochs": 1, "weights": None}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), json.dumps({**given, "score": False, **options})],
        env={
            **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "HF_DATASETS_CACHE": str(out / "cache"),
        },
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(devices)]


@pytest.mark.slow
def test_two_processes_see_each_row_once_and_score_as_one(
    model_dir: Path, files: dict[str, str], tmp_path: Path
) -> None:
    two = run(model_dir, files, tmp_path / "two", 2, score=True)
    (one,) = run(model_dir, files, tmp_path / "one", 1, score=True)
    assert [len(told["rows"]) for told in two] == [8, 8]  # 16 rows by 2 in a batch
    assert len(set(one["rows"])) == 16
    assert sorted(two[0]["rows"] + two[1]["rows"]) == sorted(one["rows"])
    figures = one["figures"]
    assert {"validation/score", "validation/choices/acc", "validation/answers/token_prob"} <= figures.keys()
    assert 0 < figures["validation/texts/share"] < 1
    for told in two:
        assert told["figures"] == pytest.approx(figures, rel=1e-5)
        assert told["outcomes"] == pytest.approx(one["outcomes"], rel=1e-5)
    assert len(one["outcomes"]) == 3 + 5 + 3


@pytest.mark.slow
def test_two_processes_mix_by_weight(model_dir: Path, files: dict[str, str], tmp_path: Path) -> None:
    two = run(model_dir, files, tmp_path / "two", 2, weights=[1, 3], epochs=3)
    seen = Counter(row for told in two for row in told["rows"])
    sizes = {kind: [count for row, count in seen.items() if ("say" in row) == (kind == "answers")] for kind in
             ("choices", "answers")}  # fmt: skip
    total = sum(seen.values())
    assert total == 3 * 16
    assert sum(sizes["answers"]) == pytest.approx(0.75 * total, abs=8)  # to within a row in 256
    for counts, rows in ((sizes["choices"], 10), (sizes["answers"], 6)):  # a source is gone through before a row again
        counts += [0] * (rows - len(counts))
        assert len(counts) == rows
        assert max(counts) - min(counts) <= 1
