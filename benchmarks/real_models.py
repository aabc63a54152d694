"""Searches on small real models and real task data, over several seeds, as one table.

    python benchmarks/real_models.py --data DIRECTORY --out runs/real --seeds 0 1 2 --jobs 2

DIRECTORY holds `models/NAME` (Hugging Face directories) and `datasets/NAME/{train,test}.jsonl`. Every search is the
command `qratk search` in a process of its own on one thread; one that was interrupted is resumed, one that is done is
only read. The table is printed as Markdown: scores on the validation items that the search saw, and on test items that
it never saw, as mean and range over seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Run:
    """One search: a model, a task and a seed."""

    model: str
    task: str
    seed: int

    def command(self, data: Path, out: Path) -> list[str]:
        """The command line of the search."""
        files = {split: str(data / "datasets" / self.task / f"{split}.jsonl") for split in ("train", "test")}
        return [
            *(sys.executable, "-m", "qratk", "search"),
            *("--config", str(HERE / f"real_{self.task}.yaml"), "--run_dir", str(self.directory(out))),
            f"--model.model={data / 'models' / self.model}",
            *(f"--data.{split}={path}" for split, path in files.items()),
            *(f"--{key}={self.seed}" for key in ("seed_everything", "model.seed", "data.seed", "search.seed")),
        ]

    def directory(self, out: Path) -> Path:
        """Where the search writes."""
        return out / f"{self.model}-{self.task}-{self.seed}"

    def result(self, data: Path, out: Path) -> dict[str, Any]:
        """The search's result; searches first when there is none."""
        path = self.directory(out) / "result.json"
        if not path.exists():
            self.directory(out).mkdir(parents=True, exist_ok=True)
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            with (self.directory(out) / "log.txt").open("a") as log:
                done = subprocess.run(
                    self.command(data, out), stdout=log, stderr=subprocess.STDOUT, env=environment, check=False
                )
            if done.returncode != 0:
                raise SystemExit(f"{self} failed with status {done.returncode}; see {log.name}")
        print(f"{self}: done", file=sys.stderr)
        return dict(json.loads(path.read_text()))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/real"))
    parser.add_argument("--models", nargs="+", default=["stories260k", "deep12"])
    parser.add_argument("--tasks", nargs="+", default=["trec", "stories_lower_lm"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1)
    return parser.parse_args()


def spread(values: Sequence[float]) -> str:
    """Mean and range as text."""
    return f"{statistics.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def rows(results: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown rows of one model and task, one result a seed."""
    measured: dict[str, list[dict[str, Any]]] = {"best found": [result["best"] for result in results]}
    for kind in ("baselines", "references"):
        for result in results:
            for evaluation in result[kind]:
                name = evaluation["configuration"].split("*")[0]
                label = f"uniform {name}" if kind == "baselines" else f"reference {name}"
                measured.setdefault(label, []).append(evaluation)
    lines = []
    for label, evaluations in measured.items():
        tests = [
            result["test_scores"][evaluation["configuration"]]["score"]
            for result, evaluation in zip(results, evaluations, strict=True)
        ]
        scores = [evaluation["score"] for evaluation in evaluations]
        size = statistics.mean(evaluation["storage_bytes"] for evaluation in evaluations) / 1024
        lines.append(f"| {label} | {size:.1f} | {spread(scores)} | {spread(tests)} |")
    return lines


def main() -> None:
    """Run what is missing, and print the tables."""
    given = arguments()
    runs = [Run(m, t, s) for s in given.seeds for t in given.tasks for m in given.models]
    with ThreadPoolExecutor(given.jobs) as pool:
        results = dict(zip(runs, pool.map(lambda run: run.result(given.data, given.out), runs), strict=True))
    for model in given.models:
        for task in given.tasks:
            mine = [results[Run(model, task, seed)] for seed in given.seeds]
            print(f"\n### {model}, {task}, {len(mine)} seeds\n")
            print("| | KiB | validation score | test score |\n|---|---|---|---|")
            print("\n".join(rows(mine)))
            rungs = [result["evaluations_by_rung"] for result in mine]
            seconds = [result["seconds"]["total"] for result in mine]
            print(f"\nEvaluations by rung and seed: {rungs}; seconds: {[round(s) for s in seconds]}")
            for seed, result in zip(given.seeds, mine, strict=True):
                print(f"seed {seed}: best {result['best']['configuration']}")


if __name__ == "__main__":
    main()
