"""Candidates side by side against one after another, through the evaluator.

    python benchmarks/cohort.py [--data DIR] [--models stories260k deep12 embedded] [--together 1 2 4 8 16 25]

25 random candidates are trained and scored at one rung by `FineTuneEvaluator(cohort=K)`: seconds a candidate, the ratio
to K = 1 of the same repeat, and the largest relative difference of a score to K = 1. Every evaluation begins anew; the
model, the bank and its dense weights are there already. `--steps 15` is the lowest rung of the small models' searches.
"""

from __future__ import annotations

from common import Subject, finish, paired_ratios, parser, prepared, scratch, seconds, spread, subject, table, verdict

# isort: split
import argparse
import inspect
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from whole_search import opened, requests

from qratk.core import Configuration, Evaluation
from qratk.core.evaluation import FidelityLadder
from qratk.evaluators.finetune import FineTuneEvaluator

TARGET = 3.0


def candidates(chosen: Subject, layers: int, count: int) -> list[Configuration]:
    """Random configurations over the ladders of the search."""
    draw = random.Random(0)
    bits, ranks = chosen.search["bits"], chosen.search["ranks"]
    return [Configuration.of(draw.choices(bits, k=layers), draw.choices(ranks, k=layers)) for _ in range(count)]


def measured(chosen: Subject, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Seconds a candidate and scores at each K; K = 1 and the others in turn, repeat after repeat."""
    evaluator = opened(chosen, folder, FidelityLadder((given.steps,)), {})
    asked = requests(candidates(chosen, len(evaluator.shapes), given.candidates), given.steps)
    found: dict[int, list[float]] = {width: [] for width in given.together}
    scores: dict[int, list[float]] = {}

    def evaluate(width: int) -> None:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        groups = (asked[first : first + width] for first in range(0, len(asked), width))
        evaluations: list[Evaluation] = [e for group in groups for e in evaluator.evaluate(group)]
        scores[width] = [evaluation.score for evaluation in evaluations]

    evaluator.evaluate(asked[:2])  # builds the bank and warms up
    for _ in range(given.repeats):
        for width in given.together:
            found[width].append(seconds(lambda w=width: evaluate(w), given.clock) / len(asked))  # type: ignore[misc]
    first = given.together[0]
    differences = {
        width: max(abs(a - b) / max(abs(b), 1e-9) for a, b in zip(scores[width], scores[first], strict=True))
        for width in given.together
    }
    ratios = {width: paired_ratios(found[first], found[width]) for width in given.together}
    rows = [
        [str(width), spread(found[width], digits=3), spread(ratios[width]), f"{differences[width]:.1e}"]
        for width in given.together
    ]
    print(f"\n### {chosen.name}: {given.candidates} candidates, {given.steps} steps\n")
    print(table(["side by side", "s a candidate", "times as fast", "largest difference of a score"], rows))
    best = max(ratios, key=lambda width: sorted(ratios[width])[len(ratios[width]) // 2])
    print(verdict(f"best, K = {best}", ratios[best], at_least=TARGET), flush=True)
    return {"seconds": found, "ratios": ratios, "differences": differences}


def main() -> None:
    """Every model."""
    options = parser(__doc__, repeats=3)
    options.add_argument("--models", nargs="+", default=["stories260k", "deep12", "embedded"])
    options.add_argument("--together", nargs="+", type=int, default=[1, 2, 4, 8, 16, 25])
    options.add_argument("--candidates", type=int, default=25)
    options.add_argument("--steps", type=int, default=15)
    given = prepared(options)
    if "cohort" not in inspect.signature(FineTuneEvaluator).parameters:
        print("skipped: this version of the library trains one candidate after another")
        return
    results: dict[str, Any] = {}
    with scratch() as folder:
        for name in given.models if given.data is not None else ["embedded"]:
            chosen = subject(given, folder, name)
            smooth = replace(chosen, data={**chosen.data, "score": "log_likelihood"})  # accuracies hide differences
            results[name] = measured(smooth, folder / name, given)
    finish(given, "cohort", results)


if __name__ == "__main__":
    main()
