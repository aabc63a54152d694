"""A small made-up search: its plan, records, summaries and result, and how the loop would tell a reporter of it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from qratk.core import (
    Budget,
    Candidate,
    Configuration,
    Evaluation,
    FidelityLadder,
    History,
    Importance,
    LayerBytes,
    LayerShape,
    MemoryModel,
    ParetoFront,
    Problem,
    SearchSpace,
    SurrogateQuality,
    Utility,
)
from qratk.core.result import (
    Comparison,
    GenerationSummary,
    Progress,
    Record,
    RefinementSummary,
    SearchPlan,
    SearchResult,
)
from qratk.reporters.base import Destination, Reporter

STEPS = (50, 150, 450)


def example_problem(num_layers: int = 12) -> Problem:
    names = tuple(f"model.layers.{i}" for i in range(num_layers))
    space = SearchSpace((2, 4, 8), (4, 8, 16), names)
    parameters = 3_000_000
    layer = LayerBytes(
        weights={q: parameters * q // 8 for q in space.bits},
        metadata=dict.fromkeys(space.bits, parameters // 32),
        adapters={r: 2 * r * 12_000 for r in space.ranks},
    )
    memory = MemoryModel(space, (layer,) * num_layers, (parameters,) * num_layers, fixed_bytes=20_000_000)
    shapes = tuple(LayerShape(name, (("proj", 1500, 2000),)) for name in names)
    rng = np.random.default_rng(3)
    importance = Importance(tuple(rng.gamma(1.5, size=num_layers)), tuple(rng.gamma(1.5, size=num_layers)))
    budget = Budget(memory.bytes(space.uniform(4, 16)))
    return Problem(shapes, memory, budget, importance)


def _quality(problem: Problem, configuration: Configuration) -> float:
    bits = np.log2(configuration.bits) / 3 @ problem.normalised_importance["bits"]
    ranks = np.log2(configuration.ranks) / 4 @ problem.normalised_importance["rank"]
    return float(bits + 0.4 * ranks) / problem.num_layers


def _score(problem: Problem, configuration: Configuration, steps: int, rng: np.random.Generator) -> float:
    quality = _quality(problem, configuration)
    return float(0.25 + 0.5 * quality * (1 - 0.6 * math.exp(-steps / 200)) + rng.normal(0, 0.004))


def _evaluation(problem: Problem, configuration: Configuration, steps: int, rng: np.random.Generator) -> Evaluation:
    score = _score(problem, configuration, steps, rng)
    figures = {"acc": score / 2, "log_likelihood": score - 1}
    return Evaluation(
        configuration, steps, score, problem.footprint(configuration), seconds=steps / 40, figures=figures
    )


def _weights(problem: Problem) -> NDArray[np.float64]:
    scores = problem.normalised_importance["bits"]
    return scores / scores.sum()


def _better(problem: Problem, rng: np.random.Generator, seen: set[Configuration]) -> Configuration:
    """A new configuration from a random walk that began at uniform 4:16 and kept what was no worse."""
    current, edits, allowed = problem.space.uniform(4, 16), 0, int(rng.integers(2, 3 + problem.num_layers))
    while edits < allowed or current in seen:
        edited = current
        up = int(rng.choice(problem.num_layers, p=_weights(problem)))
        edited = problem.space.step(edited, up, "bits", 1) or edited
        for knob, direction in (("bits", -1), ("bits", -1), ("rank", int(rng.choice([-1, 1])))):
            layer = int(rng.integers(problem.num_layers))
            edited = problem.space.step(edited, layer, knob, direction) or edited  # type: ignore[arg-type]
        if problem.feasible(edited) and _quality(problem, edited) >= _quality(problem, current) - 0.001:
            current, edits = edited, edits + 1
    seen.add(current)
    return current


@functools.cache
def example_search(num_layers: int = 12, *, generations: int = 3, seed: int = 0) -> SearchResult:
    """A search of 6 baselines, `generations` of 5 + 3 + 2 evaluations and 3 refinement steps; one evaluation fails."""
    problem, rng = example_problem(num_layers), np.random.default_rng(seed)
    uniforms = tuple(c for c in problem.space.uniforms() if problem.feasible(c))
    records: list[Record] = []
    seen = set(uniforms)

    def measure(configuration: Configuration, steps: int, phase: str, generation: int, origin: str) -> Evaluation:
        evaluation = _evaluation(problem, configuration, steps, rng)
        if len(records) == len(uniforms) + 2:
            evaluation = dataclasses.replace(
                evaluation,
                score=-math.inf,
                status="failed",
                reason="loss is nan\nat step 3, \x1b[31mred\x1b[0m",
                figures={},
            )
        candidate = Candidate(configuration, origin, (), generation, phase)
        records.append(Record(len(records), candidate, evaluation))
        return evaluation

    baselines = tuple(measure(c, STEPS[-1], "baseline", 0, "uniform") for c in uniforms)
    reference = measure(problem.space.uniform(8, 16), STEPS[-1], "reference", 0, "reference")
    summaries = []
    for number in range(generations):
        pool = [_better(problem, rng, seen) for _ in range(5)]
        for steps, keep in zip(STEPS, (5, 3, 2), strict=True):
            for configuration in pool[:keep]:
                measure(configuration, steps, "global", number, "sensitivity")
        summaries.append(_generation(problem, records, number))
    history = History(r.evaluation for r in records)
    utility = Utility.over(history.at(STEPS[-1]), alpha=0.6)
    refinements = []
    for number in range(3):
        measure(_better(problem, rng, seen), STEPS[-1], "local", number, "trust_region")
        best = best_of(problem, records)
        figures = {"expected_improvement": 0.01 / (number + 1), "radius": 2.0}
        refinements.append(RefinementSummary(number, best, number == 1, figures, 12.5))
    best = best_of(problem, records)
    assert best is not None
    feasible = [r.evaluation for r in records if is_measured(problem, r)]
    return SearchResult(
        plan=SearchPlan("example", problem, FidelityLadder(STEPS), {50: 20, 150: 12, 450: 20}, uniforms),
        best=best,
        front=ParetoFront.of(feasible),
        baselines=baselines,
        references=(reference,),
        comparisons=tuple(Comparison(b, best.score - b.score, best.score - b.score - 0.02, best.score - b.score + 0.03)
                          for b in baselines),
        history=History(r.evaluation for r in records),
        records=tuple(records),
        generations=tuple(summaries),
        refinements=tuple(refinements),
        stop_reasons={"global": "3 generations were allowed", "local": "expected improvement under 1e-4"},
        utility=utility,
        seconds={"baselines": 70.0, "global": 400.0, "local": 37.5},
        test_scores={"best": {"accuracy": 0.61}, "uniform 4:16": {"accuracy": 0.59}},
        proposals={"sensitivity": 15, "trust_region": 3},
        top3_hit_rates={"surrogate": 0.66, "low_fidelity": math.nan},
    )  # fmt: skip


def is_measured(problem: Problem, record: Record) -> bool:
    evaluation = record.evaluation
    return evaluation.ok and evaluation.steps == STEPS[-1] and problem.feasible(evaluation.configuration)


def best_of(problem: Problem, records: list[Record]) -> Evaluation | None:
    measured = [r.evaluation for r in records if is_measured(problem, r)]
    return max(measured, key=lambda e: e.score, default=None)


def _generation(problem: Problem, records: list[Record], number: int) -> GenerationSummary:
    front = ParetoFront.of([r.evaluation for r in records if is_measured(problem, r)])
    quality = SurrogateQuality(3 * number, 0.7, 0.6, math.nan) if number else None
    volume = front.hypervolume((0.0, 1.1), problem.budget.limit_bytes)
    return GenerationSummary(number, front, volume, 0.01, best_of(problem, records), quality, number > 1, 130.0)


R = TypeVar("R", bound=Reporter)


def opened(reporter: R, folder: Path, fit_config: Mapping[str, Any] | None = None) -> R:
    """The reporter, with a folder to report to."""
    reporter.open(Destination(folder, fit_config or {}))
    return reporter


def play(reporter: Reporter, result: SearchResult, *, resumed: int = 0, stop_after: int | None = None) -> None:
    """Tell a reporter what the loop would; `stop_after` records it is interrupted, and not even closed."""
    plan = dataclasses.replace(result.plan, resumed=resumed)
    reporter.started(plan)
    reporter.message("budget [bold]binds[/bold] at \x1b[31m3\x1b[0m layers")
    told: list[Record] = []
    for record in result.records:
        if stop_after is not None and len(told) >= stop_after:
            return
        best = best_of(plan.problem, told)
        number, seconds = record.candidate.generation, 10.0 * len(told)
        progress = Progress(record.candidate.phase, number, record.evaluation.steps, len(told),
                            len(result.records), best, seconds, 10.0 * (len(result.records) - len(told)))  # fmt: skip
        if len(told) >= resumed:
            reporter.progress(progress)
        told.append(record)
        after = dataclasses.replace(progress, done=len(told), best=best_of(plan.problem, told), seconds=seconds + 10)
        reporter.evaluated(record, after)
        _tell_ends(reporter, result, told)
    reporter.finished(result)


def _tell_ends(reporter: Reporter, result: SearchResult, told: list[Record]) -> None:
    last = told[-1].candidate
    following = result.records[len(told)].candidate if len(told) < len(result.records) else None
    if following is not None and (following.phase, following.generation) == (last.phase, last.generation):
        return
    if last.phase == "global":
        reporter.generation(result.generations[last.generation])
    if last.phase == "local":
        reporter.refinement(result.refinements[last.generation])
