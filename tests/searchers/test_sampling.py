from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from qratk.searchers.sampling import random_downgrade, sample_feasible
from qratk.testing import toy_problem


def test_samples_are_uniform_over_the_feasible_set():
    problem = toy_problem(2, like=(4, 16))
    rng = np.random.default_rng(0)
    counts = Counter(sample_feasible(problem, rng) for _ in range(3000))
    layers = [c.layers[0] for c in problem.space.uniforms()]
    feasible = {
        c for c in (type(problem.space.smallest)((a, b)) for a in layers for b in layers) if problem.feasible(c)
    }
    assert set(counts) == feasible
    expected = 3000 / len(feasible)
    assert all(abs(count - expected) < 6 * np.sqrt(expected) for count in counts.values())


@pytest.mark.parametrize("case", [{"like": (2, 4)}, {"like": (2, 8)}, {"like": (8, 16), "max_average_bits": 2.2}])
def test_tight_budgets_are_sampled_by_stepping_down(case):
    problem = toy_problem(24, **case)
    rng = np.random.default_rng(0)
    for _ in range(5):
        assert problem.feasible(sample_feasible(problem, rng))


def test_known_configurations_are_not_sampled():
    problem = toy_problem(1, like=(2, 8))
    known = {problem.space.uniform(2, 4)}
    rng = np.random.default_rng(0)
    assert {sample_feasible(problem, rng, known=known) for _ in range(20)} == {problem.space.uniform(2, 8)}
    assert sample_feasible(problem, rng, known={*known, problem.space.uniform(2, 8)}) is None


def test_random_downgrade_stops_at_the_first_fit():
    problem = toy_problem(6)
    rng = np.random.default_rng(0)
    largest = problem.space.largest
    lowered = random_downgrade(problem, largest, rng)
    assert problem.feasible(lowered)
    assert lowered != problem.space.smallest
