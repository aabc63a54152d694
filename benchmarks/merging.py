"""Adapters of several trainings averaged, against the best of them: what a mean of as many as one has is worth.

    python benchmarks/merging.py [--data DIR] [--models embedded] [--trainings 8] [--rates 5e-3] [--adapters lora cut]
        [--common-start] [--csv FILE]

Uniform 4-bit weights, rank 8. One configuration is trained with several seeds of data order and adapters. Of the first
2, 3, ... of these trainings it tells, on validation and on test data: the mean of them alone (what one training is
worth), the best by validation, the mean of all their updates, and the greedy mean: from the best on, each is kept in
where the validation score rises. Adapters `cut` are trained at rank 16 and cut to 8 after averaging. With
`--common-start` the adapters' first values are the same in all trainings, and only the order of the rows differs.
"""

from __future__ import annotations

from common import Subject, finish, parser, prepared, scratch, subject, table

# isort: split
import argparse
import csv
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lightning import Trainer

from qratk.core import Candidate, Configuration, Evaluation, Member, Request
from qratk.core.evaluation import FidelityLadder
from qratk.core.space import SearchSpace
from qratk.evaluators.base import EvaluationContext
from qratk.evaluators.finetune import FineTuneEvaluator
from qratk.training.options import FineTuneOptions

Row = dict[str, Any]
COLUMNS = ("model", "adapter", "start", "rate", "trainings", "way", "members", "validation", "test", "acc")
ADAPTERS: dict[str, Any] = {"lora": "lora", "cut": {"class_path": "cut", "init_args": {"width": 16}}}


def opened(chosen: Subject, folder: Path, given: argparse.Namespace, **options: Any) -> FineTuneEvaluator:
    """An evaluator of one rung over uniform 4 bits."""
    module = chosen.make_module(seed=0, **options)
    data = chosen.make_data(seed=0, score="log_likelihood")
    evaluator = FineTuneEvaluator(cohort=1)
    trainer = partial(Trainer, gradient_clip_val=chosen.clip, accelerator=given.accelerator, devices=1)
    evaluator.open(EvaluationContext(folder, FidelityLadder((given.steps,)), 0, module, data, trainer))
    evaluator.prepare_test()
    evaluator.memory_model(SearchSpace((4,), (8,), tuple(shape.name for shape in evaluator.shapes)))
    return evaluator


def greedy(evaluator: FineTuneEvaluator, trained: Sequence[Evaluation]) -> Evaluation:
    """The mean that the greedy recipe comes to, or the best training alone."""
    first, *others = sorted(trained, key=lambda e: -e.score)
    best = first
    members: tuple[Member, ...] = (first.member,)
    for other in others:
        tried = evaluator.merged(first, (*members, other.member))
        if tried.ok and tried.score > best.score:
            best, members = tried, tried.merged
    return best


def measured(evaluator: FineTuneEvaluator, given: argparse.Namespace) -> Iterator[Row]:
    """Rows of one model, adapter and rate, for as many trainings as there are by then."""
    configuration = Configuration.uniform(4, 8, len(evaluator.shapes))
    tests: dict[tuple[Member, ...], dict[str, float]] = {}

    def row(way: str, found: Evaluation, count: int) -> Row:
        key = found.merged or (found.member,)
        if key not in tests:
            tests[key] = evaluator.test(found)
        scores = tests[key]
        figures = {"validation": found.score, "test": scores["score"], "acc": scores.get("acc", float("nan"))}
        return {"trainings": count, "way": way, "members": max(1, len(found.merged)), **figures}

    trained: list[Evaluation] = []
    for number in range(1, given.trainings + 1):
        (found,) = evaluator.evaluate([Request(Candidate(configuration, "benchmark"), given.steps, number)])
        if not found.ok:
            print(f"# training {number} failed: {found.reason}")
            continue
        trained.append(found)
        yield row("one", found, number)
        if len(trained) > 1:
            leading = max(trained, key=lambda e: e.score)
            yield row("best", leading, number)
            yield row("all", evaluator.merged(leading, [e.member for e in trained]), number)
            yield row("greedy", greedy(evaluator, trained), number)


def told(rows: list[Row]) -> str:
    """By model and adapter: the mean of single trainings, and what of all of them each way comes to."""
    lines, groups = [], dict[tuple[Any, ...], list[Row]]()
    for row in rows:
        groups.setdefault((row["model"], row["adapter"], row["start"], row["rate"]), []).append(row)
    for key, own in groups.items():
        most = max(row["trainings"] for row in own)
        ones = [row["test"] for row in own if row["way"] == "one"]
        last = {row["way"]: row for row in own if row["trainings"] == most}
        figures = [f"{last[way]['test']:.3f} / {last[way]['acc']:.3f}" for way in ("best", "all", "greedy")]
        spread = f"{statistics.fmean(ones):.3f} ± {statistics.stdev(ones):.3f}"
        lines.append([*map(str, key), str(most), spread, *figures, str(last["greedy"]["members"])])
    heads = ["model", "adapter", "start", "rate", "trainings", "one", "best", "mean of all", "greedy mean", "of"]
    return table(heads, lines)


def main() -> None:
    """Every model, adapter and rate."""
    options = parser(__doc__, repeats=1)
    options.add_argument("--models", nargs="+", default=["embedded"])
    options.add_argument("--trainings", type=int, default=8)
    options.add_argument("--rates", nargs="+", type=float, default=[5e-3])
    options.add_argument("--adapters", nargs="+", default=list(ADAPTERS), choices=ADAPTERS)
    options.add_argument("--common-start", action="store_true", help="the adapters' first values are always the same")
    options.add_argument("--steps", type=int, default=40)
    options.add_argument("--batch", type=int, help="sequences in a batch, where not those of the model's task")
    options.add_argument("--items", type=int, help="validation items, where not those of the model's task")
    options.add_argument("--test-items", type=int, help="test items, where not those of the model's task")
    options.add_argument("--accelerator", default="cpu", help="as of Lightning's Trainer")
    options.add_argument("--csv", type=Path, help="file for every figure")
    given = prepared(options)
    if given.common_start:
        FineTuneOptions.training_seed = property(lambda own: own.seed)  # type: ignore[assignment,method-assign]
    rows: list[Row] = []
    for name in given.models:
        for adapter in given.adapters:
            for rate in given.rates:
                with scratch() as folder:
                    chosen = subject(given, folder, name)
                    validation = "max_validation_items" if name == "embedded" else "validation_items"
                    changes = {"batch_size": given.batch, validation: given.items, "max_test_items": given.test_items}
                    given_data = {key: value for key, value in changes.items() if value is not None}
                    chosen = replace(chosen, data={**chosen.data, **given_data})
                    evaluator = opened(chosen, folder, given, learning_rate=rate, adapter=ADAPTERS[adapter])
                    start = "common" if given.common_start else "own"
                    for row in measured(evaluator, given):
                        rows.append({"model": chosen.name, "adapter": adapter, "start": start, "rate": rate, **row})
                        print(*(rows[-1][column] for column in COLUMNS), sep=",", flush=True)
    print(told(rows))
    if given.csv is not None:
        with given.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    finish(given, "merging", {"rows": rows})


if __name__ == "__main__":
    main()
