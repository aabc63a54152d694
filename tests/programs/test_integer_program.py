from __future__ import annotations

import itertools

import numpy as np
import pytest

from qratk.core import Configuration, Problem
from qratk.core.errors import ConfigurationError, InfeasibleBudgetError
from qratk.programs import integer
from qratk.programs.integer import best_choice
from qratk.testing import toy_problem

CASES = [{}, {"like": (4, 4)}, {"like": (2, 4)}, {"like": (8, 16), "max_average_bits": 3.5}]


def value_of(problem: Problem, values: np.ndarray, configuration: Configuration) -> float:
    indices = problem.space.indices(configuration)
    return float(values[np.arange(len(indices)), indices[:, 0], indices[:, 1]].sum())


def brute_force(problem: Problem, values: np.ndarray) -> float:
    grids = itertools.product(itertools.product(range(3), range(3)), repeat=problem.num_layers)
    found = (problem.space.from_indices(np.array(grid)) for grid in grids)
    return max(value_of(problem, values, c) for c in found if problem.feasible(c))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", CASES)
def test_best_choice_agrees_with_brute_force(case, seed):
    problem, rng = toy_problem(4, seed, **case), np.random.default_rng(seed)
    values = rng.normal(size=(4, 3, 3))
    found = best_choice(problem, values, gap=0.0)
    assert problem.feasible(found)
    assert value_of(problem, values, found) == pytest.approx(brute_force(problem, values))


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_units_of_the_values_do_not_matter(scale):
    problem, values = toy_problem(6), np.random.default_rng(0).normal(size=(6, 3, 3))
    assert best_choice(problem, values * scale + scale, gap=0.0) == best_choice(problem, values, gap=0.0)


def test_forbidden_choices_are_not_taken():
    problem, values = toy_problem(5), np.random.default_rng(0).normal(size=(5, 3, 3))
    values[:, :, 0] = -np.inf
    values[2, 1:] = -np.inf
    found = best_choice(problem, values)
    assert min(found.ranks) > 4
    assert found.bits[2] == 2


@pytest.mark.parametrize("case", CASES)
def test_greedy_choice_stands_in_for_the_solver(case, monkeypatch):
    monkeypatch.setattr(integer, "_solved", lambda choices, gap: None)
    problem, rng = toy_problem(4, **case), np.random.default_rng(0)
    values = rng.gamma(1.0, size=(4, 3, 3)).cumsum(axis=1).cumsum(axis=2)
    found = best_choice(problem, values)
    assert problem.feasible(found)
    assert value_of(problem, values, found) >= 0.8 * brute_force(problem, values)


def test_budget_below_all_allowed_choices_is_refused():
    values = np.zeros((4, 3, 3))
    values[:, :2] = -np.inf
    with pytest.raises(InfeasibleBudgetError, match="no allowed configuration fits"):
        best_choice(toy_problem(4, like=(4, 4)), values)


@pytest.mark.parametrize(
    "values",
    [np.zeros((4, 3, 2)), np.full((4, 3, 3), np.nan), np.full((4, 3, 3), -np.inf)],
    ids=["shape", "nan", "none"],
)
def test_values_that_make_no_sense_are_refused(values):
    with pytest.raises(ConfigurationError, match="values of choices"):
        best_choice(toy_problem(4), values)
