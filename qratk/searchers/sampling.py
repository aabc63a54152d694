"""Random feasible configurations, without guidance."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from qratk.core.configuration import KNOBS, Configuration
from qratk.core.edits import Ledger
from qratk.core.problem import Problem

REJECTIONS = 200
TRIES = 50


def sample_feasible(
    problem: Problem, rng: np.random.Generator, *, known: Collection[Configuration] = ()
) -> Configuration | None:
    """Random feasible configuration that is not known, or None when none was found.

    Uniform over the feasible configurations as long as one in some hundred of the space fits. Under tighter budgets
    uniform draws would all be rejected: a draw is then stepped down at random knobs until it fits, which favours
    configurations just under the budget. Neither looks at importance.
    """
    for _ in range(TRIES):
        found = _accepted(problem, rng) or random_downgrade(problem, problem.space.random(rng), rng)
        if found not in known:
            return found
    return None


def _accepted(problem: Problem, rng: np.random.Generator) -> Configuration | None:
    """First of `REJECTIONS` uniform draws that fits; drawn in blocks, for most problems need few."""
    space = problem.space
    for block in (8, REJECTIONS - 8):
        sizes = [len(space.ladder(knob)) for knob in KNOBS]
        draws = np.stack([rng.integers(size, size=(block, space.num_layers)) for size in sizes], axis=2)
        fitting = np.flatnonzero(_bytes(problem, draws) <= problem.budget.limit_bytes)
        for row in fitting:
            configuration = space.from_indices(draws[row], ())
            if problem.feasible(configuration):  # the cap on the average bits
                return configuration.with_shared(space.random_shared(rng))
    return None


def _bytes(problem: Problem, indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """Bytes of configurations given as indices (n, L, 2)."""
    rows = np.arange(problem.num_layers)
    parts = [problem.table(knob)[rows, indices[:, :, column]].sum(axis=1) for column, knob in enumerate(KNOBS)]
    return np.asarray(sum(parts) + problem.memory.constant_bytes(problem.budget.scope), dtype=np.int64)


def random_downgrade(problem: Problem, configuration: Configuration, rng: np.random.Generator) -> Configuration:
    """Configuration stepped down in random order, just until it fits; the smallest one when nothing else does."""
    ledger = Ledger(problem, configuration)
    steps = np.repeat(np.arange(ledger.indices.size), ledger.indices.ravel())
    rng.shuffle(steps)
    for step in steps.tolist():
        if ledger.fits:
            break
        ledger.step(*divmod(step, 2), -1)
    return ledger.configuration()
