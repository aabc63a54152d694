"""Searchers that have begun on a toy problem, and what they find when all candidates run to the highest rung."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from qratk.core import Candidate, Configuration, Evaluation, FidelityLadder, History, Problem
from qratk.mutations.base import mutations
from qratk.mutations.proposer import Proposer
from qratk.repairs.base import repairs
from qratk.searchers.base import GlobalSearcher, searchers
from qratk.testing import ToyEvaluator

LADDER = FidelityLadder((100, 300, 900))
ONE_RUNG = FidelityLadder((900,))


def proposer_of(problem: Problem, *operators: str) -> Proposer:
    """Proposer with the operators named, the default ones if none."""
    names = operators or ("sensitivity", "coupled")
    return Proposer(problem, [mutations.create(name) for name in names], repairs.create("greedy"))


def begun(name: str, problem: Problem, ladder: FidelityLadder = LADDER, **options: Any) -> GlobalSearcher:
    """Searcher that has begun, with the default operators."""
    searcher = searchers.create(name, **options)
    searcher.begin(proposer_of(problem), ladder)
    return searcher


def ask_once(
    name: str, problem: Problem, history: History | None = None, *, seed: int = 0, **options: Any
) -> tuple[Candidate, ...]:
    """What a new searcher proposes first."""
    return begun(name, problem, **options).ask(history or History(), np.random.default_rng(seed))


def search(searcher: GlobalSearcher, evaluator: ToyEvaluator, generations: int) -> Iterator[History]:
    """History after each of so many generations."""
    history, rng = History(), np.random.default_rng(0)
    for _ in range(generations):
        measured = [evaluator.measure(c.configuration, 900) for c in searcher.ask(history, rng)]
        for evaluation in measured:
            history.append(evaluation)
        searcher.tell(measured)
        yield history


def best_score(name: str, seed: int, *, generations: int = 8, **options: Any) -> float:
    """Best score after so many generations on a landscape of 16 layers without noise."""
    evaluator = ToyEvaluator(16, seed, noise=0.0)
    *_, history = search(begun(name, evaluator.problem(), ONE_RUNG, **options), evaluator, generations)
    best = history.best(900)
    assert best is not None
    return best.score


def gain(name: str, seed: int, *, over: str, **options: Any) -> float:
    """Best score of a searcher less that of another with default options, after 8 generations of 10."""
    return best_score(name, seed, offspring=10, **options) - best_score(over, seed, offspring=10)


def measured_uniforms(evaluator: ToyEvaluator, problem: Problem) -> list[Evaluation]:
    """The baselines: uniform configurations that fit, at the highest rung."""
    return [evaluator.measure(c, 900) for c in problem.space.uniforms() if problem.feasible(c)]


def failure(problem: Problem, configuration: Configuration, steps: int = 900) -> Evaluation:
    """Evaluation of a run that failed."""
    return Evaluation(
        configuration, steps, -np.inf, problem.footprint(configuration), status="failed", reason="made to"
    )
