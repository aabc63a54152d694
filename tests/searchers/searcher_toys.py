"""The default proposer, and what is best after some generations that all run to the highest rung."""

from __future__ import annotations

from typing import Any

import numpy as np

from qratk.core import FidelityLadder, History, Problem
from qratk.mutations._proposer import Proposer
from qratk.mutations.base import mutations
from qratk.repairs.base import repairs
from qratk.searchers.base import searchers
from qratk.testing import ToyEvaluator


def default_proposer(problem: Problem) -> Proposer:
    return Proposer(problem, [mutations.create("sensitivity"), mutations.create("coupled")], repairs.create("greedy"))


def best_score(name: str, seed: int, **options: Any) -> float:
    """Best score after 8 generations of 10 on a landscape of 16 layers without noise."""
    evaluator, history, rng = ToyEvaluator(16, seed, noise=0.0), History(), np.random.default_rng(0)
    searcher = searchers.create(name, offspring=10, **options)
    searcher.begin(default_proposer(evaluator.problem()), FidelityLadder((900,)))
    for _ in range(8):
        measured = [evaluator.measure(c.configuration, 900) for c in searcher.ask(history, rng)]
        for evaluation in measured:
            history.append(evaluation)
        searcher.tell(measured)
    best = history.best(900)
    assert best is not None
    return best.score
