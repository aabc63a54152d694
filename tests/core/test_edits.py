from __future__ import annotations

import numpy as np
import pytest

from qratk.core import KNOBS, Budget, Problem
from qratk.core.edits import Ledger
from qratk.testing import toy_problem


def test_ledger_agrees_with_the_memory_model_after_any_walk():
    problem = toy_problem(5, bits=(2, 3, 4, 16), ranks=(0, 4, 8), like=(4, 4), max_average_bits=3.3)
    rng = np.random.default_rng(0)
    ledger = Ledger(problem, problem.space.uniform(3, 4))
    for _ in range(300):
        side, layer, column = rng.choice(np.argwhere([ledger.possible(-1), ledger.possible(1)])).tolist()
        ledger.step(layer, column, (-1, 1)[side])
        configuration = ledger.configuration()
        assert ledger.bytes == problem.bytes(configuration)
        assert ledger.fits == problem.feasible(configuration)


@pytest.mark.parametrize("direction", [-1, 1])
def test_growth_is_the_difference_of_two_footprints(direction):
    problem = toy_problem(4)
    configuration = problem.space.random(np.random.default_rng(2))
    ledger = Ledger(problem, configuration)
    growth, possible = ledger.growth(direction), ledger.possible(direction)
    for layer in range(4):
        for column, knob in enumerate(KNOBS):
            stepped = problem.space.step(configuration, layer, knob, direction)
            assert possible[layer, column] == (stepped is not None)
            expected = 0 if stepped is None else problem.bytes(stepped) - problem.bytes(configuration)
            assert growth[layer, column] == expected


@pytest.mark.parametrize("scope", ["storage", "training", "serving"])
def test_ledger_counts_in_the_scope_of_the_budget(scope):
    plain = toy_problem(4)
    problem = Problem(plain.shapes, plain.memory, Budget(10**12, scope), plain.importance)
    assert Ledger(problem, problem.space.largest).bytes == problem.memory.bytes(problem.space.largest, scope)
