"""Compensation where ranks are cut instead of guessed: bits of layers against the ranks that their adapters keep.

    python benchmarks/compensation.py [RUN ...] [--seeds 0 1 2] [--low 2] [--rank 4] [--turns N] [--csv FILE]
        [--figure FILE.png] [--data DIR --models NAME]

The RUNs are finished searches with the adapters `cut` and `allocation: model`: of each answer the rank that every layer
keeps is told beside its bits, and drawn as Fig. 3 of the paper is. Then uniform 4 bits is trained at `--width` and cut
to the bytes of `--rank`, as it is and with each layer in turn (or, in N turns, every N-th) at `--low` bits: what a
layer keeps more of then is what adapters make up for. A layer's rank is its adapters' numbers over those of one rank.
"""

from __future__ import annotations

from common import Subject, finish, parser, prepared, scratch, subject, table

# isort: split
import argparse
import csv
import functools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lightning import Trainer

from qratk.cli.blueprint import SettingsBlueprint
from qratk.compare.problem_figures import bits_and_ranks
from qratk.core import Candidate, Configuration, Request
from qratk.core.correlation import pearson
from qratk.core.evaluation import FidelityLadder
from qratk.core.memory import LayerShape
from qratk.core.space import SearchSpace
from qratk.evaluators.base import EvaluationContext
from qratk.evaluators.finetune import FineTuneEvaluator
from qratk.reporters.figures import to_png
from qratk.run.run import Run

Row = dict[str, Any]
COLUMNS = ("what", "model", "seed", "lowered", "layer", "bits", "configured", "kept", "score")


def kept(evaluator: FineTuneEvaluator, configuration: Configuration, steps: int) -> list[float]:
    """The rank that each layer keeps of a configuration's training, which is done unless it is there."""
    parts = evaluator.parts
    parts.preparation.finish(evaluator.space)
    parts.alone.train(configuration, steps)
    backbone = parts.module.backbone
    numbers = {name: tensor.numel() for name, tensor in backbone.adapters.stored_tensors().items()}
    return [
        sum(numbers.get(f"{name}.lora_{side}.weight", 0) for name, _ in layer.modules for side in "AB")
        / shape.adapter_parameters(1)
        for layer, shape in zip(backbone.layers, evaluator.shapes, strict=True)
    ]


def rows_of(
    shapes: Sequence[LayerShape], configuration: Configuration, ranks: Sequence[float], **about: Any
) -> list[Row]:
    """A row for each layer."""
    return [
        {**about, "layer": shape.name, "bits": choice.bits, "configured": choice.rank, "kept": round(rank, 3)}
        for shape, choice, rank in zip(shapes, configuration.layers, ranks, strict=True)
    ]


def answer(folder: Path) -> list[Row]:
    """What the answer of a search keeps; its training is in the run folder."""
    run = Run.open(folder)
    built, best, problem = SettingsBlueprint(dict(run.settings.document)).build(), run.best, run.result.problem
    evaluator = built.evaluator
    if best is None or not isinstance(evaluator, FineTuneEvaluator):
        raise SystemExit(f"{folder} holds no answer that was fine-tuned")
    seed = int(run.settings.document.get("seed_everything") or 0)
    evaluator.open(
        EvaluationContext(
            folder, FidelityLadder(tuple(problem.steps)), seed, built.module, built.datamodule, built.trainer
        )
    )
    names = tuple(shape.name for shape in evaluator.shapes)
    evaluator.memory_model(SearchSpace(tuple(problem.bits), tuple(problem.ranks), names))
    ranks = kept(evaluator, best.configuration, best.steps)
    name = run.settings.section("search").get("name", "a search")
    about = {
        "what": f"answer of {name}",
        "model": built.module.options.model,
        "seed": seed,
        "lowered": "",
        "score": best.score,
    }
    return rows_of(evaluator.shapes, best.configuration, ranks, **about)


def lowered(chosen: Subject, folder: Path, given: argparse.Namespace, seed: int) -> Iterator[Row]:
    """What layers keep at 4 bits, and with each in turn at the low bits."""
    how = {"width": given.width, "metric": "plain", "allocation": "model"}
    module = chosen.make_module(seed=seed, adapter={"class_path": "cut", "init_args": how}, learning_rate=given.rate)
    data = chosen.make_data(seed=seed, score="log_likelihood", **({"batch_size": given.batch} if given.batch else {}))
    evaluator = FineTuneEvaluator(cohort=1)
    trainer = partial(Trainer, gradient_clip_val=chosen.clip, accelerator="cpu", devices=1)
    evaluator.open(EvaluationContext(folder, FidelityLadder((given.steps,)), seed, module, data, trainer))
    names = tuple(shape.name for shape in evaluator.shapes)
    evaluator.memory_model(SearchSpace((given.low, 4), (given.rank,), names))
    uniform = Configuration.uniform(4, given.rank, len(names))
    turns = given.turns or len(names)
    for turn in (None, *range(turns)):
        low = range(len(names))[turn::turns] if turn is not None else ()
        configuration = functools.reduce(lambda c, layer: c.replace(layer, bits=given.low), low, uniform)
        (found,) = evaluator.evaluate([Request(Candidate(configuration, "benchmark"), given.steps)])
        ranks = kept(evaluator, configuration, given.steps)
        at = " ".join(names[layer] for layer in low)
        about = {"what": "lowered", "model": chosen.name, "seed": seed, "lowered": at, "score": found.score}
        yield from rows_of(evaluator.shapes, configuration, ranks, **about)


def told_answers(rows: Sequence[Row]) -> str:
    """Correlation of bits and kept ranks by seed, and the mean rank by bits."""
    lines = []
    for (what, seed), own in _by(rows, "what", "seed").items():
        bits, ranks = [row["bits"] for row in own], [row["kept"] for row in own]
        correlation = f"{pearson(np.array(bits), np.array(ranks)):+.2f}" if len(set(bits)) > 1 else ""
        by_bits = {b: statistics.fmean(r["kept"] for r in group) for (b,), group in sorted(_by(own, "bits").items())}
        means = ", ".join(f"{b} bits: {mean:.1f}" for b, mean in by_bits.items())
        given = statistics.fmean(row["configured"] for row in own)
        lines.append([what, str(seed), correlation, means, f"{given:.2f}"])
    return table(["", "seed", "correlation of bits and kept ranks", "mean rank kept at", "mean rank configured"], lines)


def told_lowered(rows: Sequence[Row]) -> str:
    """Mean over seeds of the rank that a layer keeps at 4 bits and at the low ones."""
    lines = []
    for (layer,), own in _by(rows, "layer").items():
        before = {row["seed"]: row["kept"] for row in own if not row["lowered"]}
        after = {row["seed"]: row["kept"] for row in own if layer in row["lowered"].split()}
        rise = [after[seed] - before[seed] for seed in after]
        up = sum(value > 0 for value in rise)
        values = (statistics.fmean(before.values()), statistics.fmean(after.values()), statistics.fmean(rise))
        lines.append([layer, *(f"{value:.2f}" for value in values), f"{up} of {len(rise)}"])
    mean = statistics.fmean(float(line[3]) for line in lines)
    lines.append(["mean", "", "", f"{mean:.3f}", ""])
    return table(["layer", "kept at 4 bits", "kept at the low bits", "rise", "rises"], lines)


def _by(rows: Sequence[Row], *columns: str) -> Mapping[tuple[Any, ...], list[Row]]:
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[column] for column in columns), []).append(row)
    return found


def main() -> None:
    """Answers of searches, then layers lowered one by one."""
    options = parser(__doc__, repeats=1)
    options.add_argument("runs", nargs="*", type=Path, help="folders of finished searches")
    options.add_argument("--models", nargs="+", default=["embedded"])
    options.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    options.add_argument("--low", type=int, default=2)
    options.add_argument(
        "--turns", type=int, help="lower every N-th layer at once, in so many turns; default each alone"
    )
    options.add_argument("--rank", type=int, default=4)
    options.add_argument("--width", type=int, default=16)
    options.add_argument("--rate", type=float, default=5e-3)
    options.add_argument("--steps", type=int, default=40)
    options.add_argument("--batch", type=int, help="sequences in a batch, where not those of the model's task")
    options.add_argument("--csv", type=Path, help="file for every figure")
    options.add_argument("--figure", type=Path, help="file for the picture of the answers")
    given = prepared(options)
    answers = [row for folder in given.runs for row in answer(folder)]
    if answers:
        print(told_answers(answers), flush=True)
    if answers and given.figure is not None:
        by_seed = list(_by(answers, "what", "seed").values())
        bits, ranks = (np.array([[row[key] for row in own] for own in by_seed], float) for key in ("bits", "kept"))
        layers = [row["layer"] for row in by_seed[0]]
        ladders = {"bits_ladder": sorted({row["bits"] for row in answers}), "rank_ladder": (4, 8, 12, 16)}
        picture = bits_and_ranks("Ranks kept of the answers", layers, bits, ranks, **ladders)
        given.figure.write_bytes(to_png(picture.figure))
    rows: list[Row] = []
    for name in given.models:
        for seed in given.seeds:
            with scratch() as folder:
                rows += lowered(subject(given, folder, name), folder / "run", given, seed)
    if rows:
        print(told_lowered(rows))
    if given.csv is not None:
        with given.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows([*answers, *rows])
    finish(given, "compensation", {"rows": [*answers, *rows]})


if __name__ == "__main__":
    main()
