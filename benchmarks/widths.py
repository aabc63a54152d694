"""Adapters trained narrow against those trained wide and cut: test scores at equal bytes.

    python benchmarks/widths.py [--data DIR] [--models embedded] [--seeds 0 1 2 3 4] [--rates 5e-3] [--csv FILE]
        [--accelerator gpu] [--heal 4 8]

Uniform 4-bit weights. Plain LoRA is trained at each of `--ranks`; the method `cut` once, at `--width`, and its
training is then cut to each of the ranks by every metric and allocation. All see the same batches for the same steps.
Other models are those of `--data`, on TREC.

`--heal N` trains so many steps less at the width, cuts each projection to its rank, and trains what is kept for the N
steps: as many steps in all. The learning rate goes on along the one schedule, or (`own` in the column `heal`) the
wide training has come to the end of a schedule of its own before. AdamW's moments begin anew after the cut.
"""

from __future__ import annotations

from common import Subject, finish, parser, prepared, scratch, subject, table

# isort: split
import argparse
import csv
import itertools
import statistics
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

from lightning import Trainer

from qratk.adapters.cut import Allocation, Cut, Metric
from qratk.core import Candidate, Configuration, Request
from qratk.core.evaluation import FidelityLadder
from qratk.core.space import SearchSpace
from qratk.evaluators.base import EvaluationContext
from qratk.evaluators.finetune import FineTuneEvaluator

Row = dict[str, Any]
COLUMNS = (
    "model", "rate", "seed", "trained", "stored", "metric", "allocation", "dtype", "heal", "bytes", "validation",
    "test", "acc",
)  # fmt: skip
KEY = ("model", "rate", "trained", "stored", "metric", "allocation", "dtype", "heal")
SCHEDULES = ("one", "own")


def opened(
    chosen: Subject, folder: Path, given: argparse.Namespace, seed: int, *, rungs: tuple[int, ...] = (), **options: Any
) -> FineTuneEvaluator:
    """An evaluator over uniform 4 bits, of one rung unless others are given."""
    module = chosen.make_module(seed=seed, **options)
    data = chosen.make_data(seed=seed, score="log_likelihood")
    evaluator = FineTuneEvaluator(cohort=1)
    trainer = partial(Trainer, gradient_clip_val=chosen.clip, accelerator=given.accelerator, devices=1)
    evaluator.open(EvaluationContext(folder, FidelityLadder(rungs or (given.steps,)), seed, module, data, trainer))
    evaluator.prepare_test()
    names = tuple(shape.name for shape in evaluator.shapes)
    evaluator.memory_model(SearchSpace((4,), tuple(sorted({*given.ranks, given.width})), names))
    return evaluator


def scored(evaluator: FineTuneEvaluator, ranks: list[int], steps: int) -> Iterator[tuple[int, Row]]:
    """Scores of uniform configurations, rank by rank."""
    for rank in ranks:
        configuration = Configuration.uniform(4, rank, len(evaluator.shapes))
        (found,) = evaluator.evaluate([Request(Candidate(configuration, "benchmark"), steps)])
        test = evaluator.test(found) if found.ok else {"score": float("nan")}
        figures = {"validation": found.score, "test": test["score"], "acc": test.get("acc", float("nan"))}
        yield rank, {"stored": rank, "bytes": found.footprint.adapters, **figures}


def measured(chosen: Subject, folder: Path, given: argparse.Namespace, seed: int, rate: float) -> Iterator[Row]:
    """Rows of one model, seed and rate."""
    for dtype in given.dtypes:
        options = {"learning_rate": rate, "adapter_dtype": dtype}
        for row in _by_method(chosen, folder / dtype, given, seed, options):
            yield {"model": chosen.name, "rate": rate, "seed": seed, "dtype": dtype, "heal": 0, **row}


def _by_method(
    chosen: Subject, folder: Path, given: argparse.Namespace, seed: int, options: dict[str, Any]
) -> Iterator[Row]:
    narrow = opened(chosen, folder / "narrow", given, seed, **options)
    for rank, row in scored(narrow, [] if given.cut_only else sorted({*given.ranks, given.width}), given.steps):
        yield {"trained": rank, "metric": "", "allocation": "", **row}
    for metric in given.metrics:
        for allocation in given.allocations:
            how = {"width": given.width, "metric": metric, "allocation": allocation}
            method = {"class_path": "cut", "init_args": how}
            # One folder: what is trained is the same, and its moments were taken for the first.
            wide = opened(chosen, folder / "wide", given, seed, adapter=method, **options)
            for _, row in scored(wide, given.ranks, given.steps):
                yield {"trained": given.width, "metric": metric, "allocation": allocation, **row}
    for steps, schedule, metric in itertools.product(given.heal, given.schedules, given.metrics):
        place = folder / f"heal-{steps}-{schedule}"
        for _, row in healed(chosen, place, given, seed, metric, steps, schedule, options):
            yield {"trained": given.width, "metric": metric, "allocation": "projection", **row}


def healed(
    chosen: Subject,
    folder: Path,
    given: argparse.Namespace,
    seed: int,
    metric: str,
    steps: int,
    schedule: str,
    options: dict[str, Any],
) -> Iterator[tuple[int, Row]]:
    """Scores of ranks that were trained for the last steps after the cut."""
    before = given.steps - steps
    method = {"class_path": "cut", "init_args": {"width": given.width, "metric": metric}}
    total = given.steps if schedule == "one" else before
    wide = opened(
        chosen, folder / "wide", given, seed, rungs=(before,), adapter=method, schedule_steps=total, **options
    )
    narrow = opened(
        chosen, folder / metric, given, seed, rungs=(before, given.steps), schedule_steps=given.steps, **options
    )
    backbone = wide.parts.module.backbone
    for rank in given.ranks:
        configuration = Configuration.uniform(4, rank, len(wide.shapes))
        (found,) = wide.evaluate([Request(Candidate(configuration, "benchmark"), before)])
        done, state = wide.parts.rungs.latest(configuration, before)
        if not found.ok or state is None:
            raise SystemExit(f"the training of {before} steps failed: {found.reason}")
        names = [name for layer in backbone.layers for name, _ in layer.modules]
        cut = Cut(given.width, metric).cut(
            state.adapter, dict.fromkeys(names, rank), backbone.adapter_options(configuration)
        )
        kept = {
            f"{name}.lora_{side}.weight": value
            for name, pair in cut.items()
            for side, value in zip("AB", pair, strict=True)
        }
        narrow.parts.rungs.save(configuration, done, replace(state, adapter=kept, optimizer={}))
    for rank, row in scored(narrow, given.ranks, given.steps):
        yield rank, {"heal": f"{steps} {schedule}", **row}


def told(rows: list[Row]) -> str:
    """Means over seeds."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = tuple(row[name] for name in KEY)
        groups.setdefault(key, []).append(row)
    lines = [
        [
            *map(str, key),
            str(own[0]["bytes"]),
            f"{statistics.fmean(r['test'] for r in own):.3f}",
            " ".join(f"{r['test']:.3f}" for r in own),
            f"{statistics.fmean(r['acc'] for r in own):.3f}",
        ]
        for key, own in groups.items()
    ]
    heads = [
        "model",
        "rate",
        "trained at",
        "stored at",
        "metric",
        "allocation",
        "in",
        "healed",
        "bytes",
        "test",
        "by seed",
        "acc",
    ]
    return table(heads, lines)


def main() -> None:
    """Every model, rate and seed."""
    options = parser(__doc__, repeats=1)
    options.add_argument("--models", nargs="+", default=["embedded"])
    options.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    options.add_argument("--rates", nargs="+", type=float, default=[5e-3])
    options.add_argument("--ranks", nargs="+", type=int, default=[2, 4, 8])
    options.add_argument("--width", type=int, default=16)
    options.add_argument("--steps", type=int, default=40)
    options.add_argument("--batch", type=int, help="sequences in a batch, where not those of the model's task")
    options.add_argument("--length", type=int, help="tokens of a sequence, at most")
    options.add_argument(
        "--items", type=int, help="validation items and test items, where not those of the model's task"
    )
    options.add_argument("--metrics", nargs="+", default=list(reversed(get_args(Metric))), choices=get_args(Metric))
    options.add_argument("--allocations", nargs="+", default=list(get_args(Allocation)), choices=get_args(Allocation))
    options.add_argument("--dtypes", nargs="+", default=["bfloat16"], help="types that adapters are stored in")
    options.add_argument("--cut-only", action="store_true", help="without those that are trained narrow")
    options.add_argument("--heal", nargs="+", type=int, default=[], help="steps of healing to try, within --steps")
    options.add_argument("--schedules", nargs="+", default=list(SCHEDULES), choices=SCHEDULES, help="of healing")
    options.add_argument("--accelerator", default="cpu", help="as of Lightning's Trainer")
    options.add_argument("--csv", type=Path, help="file for every figure")
    given = prepared(options)
    rows: list[Row] = []
    for name in given.models:
        for rate in given.rates:
            for seed in given.seeds:
                with scratch() as folder:
                    chosen = subject(given, folder, name)
                    changes = {
                        "batch_size": given.batch,
                        "max_length": given.length,
                        "validation_items": None if name == "embedded" else given.items,
                        "max_validation_items": given.items,
                        "max_test_items": given.items,
                    }
                    data = {**chosen.data, **{k: v for k, v in changes.items() if v is not None}}
                    chosen = replace(chosen, data=data)
                    for row in measured(chosen, folder, given, seed, rate):
                        rows.append(row)
                        print(*(row[column] for column in COLUMNS), sep=",", flush=True)
    print(told(rows))
    if given.csv is not None:
        with given.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    finish(given, "widths", {"rows": rows})


if __name__ == "__main__":
    main()
