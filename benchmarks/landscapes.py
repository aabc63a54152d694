"""Strategies on many simulated landscapes at equal numbers of evaluations: which part of a recipe earns what.

    python benchmarks/landscapes.py --recipes configs/ablations/*.yaml --layers 12 32 80 --landscapes 10 --jobs 2

A recipe is a YAML file with a `search` section laid over `configs/simulated.yaml`; `--set NAME path=value ...` adds one
from the command line. The gap is 0 at the best of 100 random configurations and 1 at the best configuration that
integer programs and steepest ascent find knowing the surface; both are scores without noise, and so is that of the
incumbent, which the search itself chooses by its noisy measurements. Reported: the gap after so many evaluations at
the highest rung (mean over landscapes), the paired difference to the full recipe with its standard error, how many
evaluations until 70 % are closed (median, and the share of landscapes that got there), how many until the score of
the best of 107 random configurations is reached (the paper's yardstick), the cost in full runs, and the top-3 hit rates
of promotion from 24 pairs on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from qratk.core.problem import Importance, Problem
from qratk.core.result import SearchResult
from qratk.evaluators.landscape import best_known
from qratk.evaluators.simulated import SimulatedEvaluator
from qratk.reporters.multi import Reporters
from qratk.searchers.sampling import sample_feasible
from qratk.settings.merge import laid_over
from qratk.settings.recipe import from_section

ROOT = Path(__file__).parent.parent
MARKS = (1, 4, 6, 18, 40)


def one(task: tuple[str, dict[str, Any], int, int]) -> dict[str, Any]:
    """What a recipe did on one landscape."""
    name, section, layers, seed = task
    section = laid_over(section, {"seed": seed, "evaluator": {"init_args": {"num_layers": layers, "seed": seed}}})
    section["evaluator"].setdefault("class_path", "simulated")
    with tempfile.TemporaryDirectory() as folder:
        result = from_section(section).run(run_dir=Path(folder), reporter=Reporters([]), config={})
    return {"recipe": name, "layers": layers, "seed": seed, **measured(result, section)}


def measured(result: SearchResult, section: dict[str, Any]) -> dict[str, Any]:
    """Gaps by number of evaluations at the highest rung, and what they cost."""
    evaluator = from_section(section).evaluator
    assert isinstance(evaluator, SimulatedEvaluator)
    highest = max(section["steps"])
    evaluator._settle(section["evaluator"]["init_args"]["seed"], highest)
    zero, one_, target = _references(section, highest)
    score, gaps, costs, cost = -np.inf, [], [], 0.0
    longest: dict[Any, int] = {}
    truth = -np.inf
    for record in result.records:
        evaluation = record.evaluation
        cost += (evaluation.steps - longest.get(evaluation.configuration, 0)) / highest
        longest[evaluation.configuration] = evaluation.steps
        if evaluation.steps != highest:
            continue
        if evaluation.ok and evaluation.score > score:
            score, truth = evaluation.score, evaluator.landscape.true_score(evaluation.configuration, highest)
        gaps.append((truth - zero) / (one_ - zero))
        costs.append(cost)
    beats = [n for n, gap in enumerate(gaps, 1) if gap * (one_ - zero) + zero >= target]
    return {"gaps": gaps, "costs": costs, "yardstick": beats[0] if beats else None, "hits": result.top3_hit_rates}


_KNOWN: dict[str, tuple[float, float, float]] = {}


def _references(section: dict[str, Any], highest: int) -> tuple[float, float, float]:
    """Scores without noise: the best of 100 random configurations, the best known one, the best of 107 random ones.

    They are of the base's space and budget, whatever ladders a recipe has.
    """
    section = {**section, "bits": [2, 4, 8], "ranks": [4, 8, 16]}
    key = json.dumps([section["evaluator"], section.get("like")])
    if key not in _KNOWN:
        loop = from_section(section)
        evaluator = loop.evaluator
        assert isinstance(evaluator, SimulatedEvaluator)
        evaluator._settle(section["evaluator"]["init_args"]["seed"], highest)
        memory, budget = loop.pose([shape.name for shape in evaluator.shapes], evaluator.memory_model)
        problem = Problem(evaluator.shapes, memory, budget, Importance.uniform(len(evaluator.shapes)))
        rng = np.random.default_rng([section["evaluator"]["init_args"]["seed"], 99])
        drawn = [c for c in (sample_feasible(problem, rng) for _ in range(107)) if c is not None]
        scores = [evaluator.landscape.true_score(c, highest) for c in drawn]
        start = drawn[int(np.argmax(scores))]
        _, best = best_known(evaluator.landscape, problem, start=start)
        _KNOWN[key] = max(scores[:100]), best, max(scores)
    return _KNOWN[key]


def table(rows: Sequence[dict[str, Any]], reference: str) -> str:
    """The results as Markdown, best first."""
    recipes: dict[str, dict[tuple[int, int], dict[str, Any]]] = {}
    for row in rows:
        recipes.setdefault(row["recipe"], {})[row["layers"], row["seed"]] = row
    lines = [
        "| recipe | " + " | ".join(f"@{mark}" for mark in MARKS) + " | against " + reference
        + " @6 | @40 | 70 %: median, share | random's 107 in | full runs @6, @40 | hit rate: short run, surrogate |",
        "|---" * (len(MARKS) + 7) + "|",
    ]  # fmt: skip
    full = recipes.get(reference, {})
    for name, found in sorted(recipes.items(), key=lambda item: -_mean(item[1].values(), 40)):
        cells = list(found.values())
        line = [name, *(f"{_mean(cells, mark):.2f}" for mark in MARKS)]
        for mark in (6, 40):
            pairs = [
                _at(cell["gaps"], mark) - _at(full[key]["gaps"], mark) for key, cell in found.items() if key in full
            ]
            error = statistics.stdev(pairs) / len(pairs) ** 0.5 if len(pairs) > 1 else float("nan")
            line.append(f"{statistics.fmean(pairs):+.3f} ± {error:.3f}" if pairs and name != reference else "")
        reached = [next((n for n, gap in enumerate(cell["gaps"], 1) if gap >= 0.7), None) for cell in cells]
        line.append(f"{_median(reached)}, {sum(n is not None for n in reached) / len(reached):.2f}")
        line.append(_median([cell["yardstick"] for cell in cells]))
        line.append(", ".join(f"{statistics.fmean(_at(c['costs'], mark) for c in cells):.1f}" for mark in (6, 40)))
        hits = [cell["hits"] for cell in cells if cell["hits"].get("pairs", 0) >= 24]
        rates = [f"{statistics.fmean(hit[key] for hit in hits):.2f}" for key in ("low_fidelity", "surrogate") if hits]
        line.append(", ".join(rates))
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines)


def _at(values: Sequence[float], mark: int) -> float:
    return values[min(mark, len(values)) - 1]


def _mean(cells: Any, mark: int) -> float:
    return statistics.fmean(_at(cell["gaps"], mark) for cell in cells)


def _median(counts: Sequence[int | None]) -> str:
    ordered = sorted(float("inf") if n is None else n for n in counts)
    middle = statistics.median(ordered)
    return "-" if middle == float("inf") else f"{middle:g}"


def recipes_of(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Every recipe's whole search section by name."""
    base = yaml.safe_load(arguments.base.read_text())["search"]
    found = {} if arguments.no_base else {base["name"]: base}
    for path in arguments.recipes:
        over = yaml.safe_load(path.read_text())["search"]
        found[over.get("name", path.stem)] = laid_over(base, over)
    for name, *settings in arguments.set or []:
        section = base
        for setting in settings:
            path, _, value = setting.partition("=")
            over = yaml.safe_load(value)
            for key in reversed(path.split(".")):
                over = {key: over}
            section = laid_over(section, over)
        found[name] = section
    return found


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=ROOT / "configs" / "simulated.yaml")
    parser.add_argument("--recipes", type=Path, nargs="*", default=[])
    parser.add_argument("--set", nargs="+", action="append", metavar=("NAME", "PATH=VALUE"))
    parser.add_argument("--no_base", action="store_true", help="leave the base itself out")
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 32, 80])
    parser.add_argument("--landscapes", type=int, default=10, help="how many of each depth")
    parser.add_argument("--first", type=int, default=0, help="seed of the first one")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON lines; what is there already is not run again")
    arguments = parser.parse_args()
    recipes = recipes_of(arguments)
    rows = [json.loads(line) for line in arguments.out.open()] if arguments.out and arguments.out.exists() else []
    done = {(row["recipe"], row["layers"], row["seed"]) for row in rows}
    seeds = range(arguments.first, arguments.first + arguments.landscapes)
    tasks = [
        (name, section, layers, seed)
        for seed in seeds
        for layers in arguments.layers
        for name, section in recipes.items()
        if (name, layers, seed) not in done
    ]
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for row in pool.map(one, tasks):
            rows.append(row)
            if arguments.out:
                with arguments.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    wanted = [row for row in rows if row["seed"] in seeds and row["layers"] in arguments.layers]
    print(table(wanted, next(iter(recipes))))


if __name__ == "__main__":
    main()
