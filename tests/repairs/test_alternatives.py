from __future__ import annotations

import itertools
import time
from collections import Counter

import numpy as np
import pytest

from qratk.core import Configuration, Problem
from qratk.core.edits import Ledger, weights_of_layers
from qratk.repairs._steps import StepsDown, lowered
from qratk.repairs.greedy import GreedyDowngrade
from qratk.repairs.optimal import OptimalDowngrade
from qratk.repairs.stochastic import StochasticDowngrade
from qratk.testing import toy_problem

EPSILON = 0.1
CASES = [{}, {"like": (2, 8)}, {"like": (4, 4), "seed": 2}, {"like": (8, 16), "max_average_bits": 4.5, "seed": 3}]


def cost(problem: Problem, before: Configuration, after: Configuration) -> float:
    """Importance given up, summed over steps down."""
    steps = problem.space.indices(before) - problem.space.indices(after)
    assert (steps >= 0).all()
    return float((weights_of_layers(problem, EPSILON) * steps).sum())


@pytest.mark.parametrize("case", CASES)
def test_optimal_repair_agrees_with_brute_force(case):
    problem = toy_problem(**{"num_layers": 3, **case})
    rng = np.random.default_rng(0)
    for configuration in (problem.space.largest, *(problem.space.random(rng) for _ in range(4))):
        below = [range(int(index) + 1) for index in problem.space.indices(configuration).ravel()]
        every = (problem.space.from_indices(np.array(i).reshape(3, 2)) for i in itertools.product(*below))
        least = min(cost(problem, configuration, c) for c in every if problem.feasible(c))
        repaired = OptimalDowngrade(EPSILON, gap=0.0).repair(problem, configuration)
        assert cost(problem, configuration, repaired) == pytest.approx(least)


def test_optimal_repair_never_costs_more_than_greedy():
    problem = toy_problem(24, seed=1)
    rng = np.random.default_rng(0)
    gains = []
    for _ in range(6):
        configuration = problem.space.random(rng)
        optimal = cost(problem, configuration, OptimalDowngrade(EPSILON).repair(problem, configuration))
        gains.append(cost(problem, configuration, GreedyDowngrade(EPSILON).repair(problem, configuration)) - optimal)
    assert min(gains) >= -1e-2
    assert max(gains) > 0


@pytest.mark.parametrize("case", CASES)
def test_steps_down_are_all_steps_in_order(case):
    problem = toy_problem(**{"num_layers": 3, **case})
    start = problem.space.random(np.random.default_rng(1))
    steps = StepsDown.of(problem, problem.space.indices(start), EPSILON)
    ledger = Ledger(problem, start)
    for i in range(steps.layer.size):
        before, bits_before = ledger.bytes, ledger.weighted_bits
        ledger.step(int(steps.layer[i]), int(steps.column[i]), -1)
        assert steps.saved_bytes[i] == before - ledger.bytes
        assert steps.saved_bits[i] == bits_before - ledger.weighted_bits
    assert ledger.configuration() == problem.space.smallest
    assert lowered(Ledger(problem, start), steps, np.ones(steps.layer.size, dtype=bool)) == problem.space.smallest


def test_stochastic_repair_stops_at_the_first_fit():
    """Raising the last step again, whichever it was, breaks the budget: no feasible superset was passed by."""
    problem = toy_problem(10)
    rng = np.random.default_rng(0)
    for _ in range(10):
        configuration = problem.space.random(rng)
        if problem.feasible(configuration):
            continue
        repaired = StochasticDowngrade().repair(problem, configuration)
        change = problem.space.indices(configuration) - problem.space.indices(repaired)
        raised = [
            problem.space.step(repaired, int(layer), ("bits", "rank")[column], 1)
            for layer, column in np.argwhere(change)
        ]
        assert any(not problem.feasible(c) for c in raised)


def test_stochastic_draws_follow_the_weights():
    """First steps drawn over many generators, against the probabilities of a single draw."""
    problem = toy_problem(3)
    policy = StochasticDowngrade(gamma=0.7, epsilon=EPSILON)
    steps = StepsDown.of(problem, problem.space.indices(problem.space.uniform(8, 8)), EPSILON)
    rng = np.random.default_rng(0)
    counts = Counter(int(policy._drawn(steps, steps.saved_bytes, rng)[0]) for _ in range(3000))
    heads = np.flatnonzero(steps.order == 0)
    weights = (steps.saved_bytes[heads] / steps.importance[heads]) ** 0.7
    for head, share in zip(heads.tolist(), weights / weights.sum(), strict=True):
        assert abs(counts[head] - 3000 * share) < 5 * np.sqrt(3000 * share * (1 - share)) + 1
    assert set(counts) <= set(heads.tolist())


def test_stochastic_steps_of_a_chain_stay_in_order():
    problem = toy_problem(6)
    steps = StepsDown.of(problem, problem.space.indices(problem.space.largest), EPSILON)
    order = StochasticDowngrade()._drawn(steps, steps.saved_bytes, np.random.default_rng(0))
    assert sorted(order.tolist()) == list(range(steps.layer.size))
    for layer, column in itertools.product(range(6), range(2)):
        mine = [int(steps.order[i]) for i in order if (steps.layer[i], steps.column[i]) == (layer, column)]
        assert mine == sorted(mine)


def test_stochastic_repair_differs_between_configurations_but_not_between_calls():
    problem = toy_problem(12)
    largest = problem.space.largest
    repaired = StochasticDowngrade().repair(problem, largest)
    assert repaired == StochasticDowngrade().repair(problem, largest)
    other = StochasticDowngrade().repair(problem, largest.replace(0, rank=8))
    assert repaired.bits != other.bits


def test_stochastic_repairs_ten_thousand_layers_in_time_that_no_square_of_them_would_take():
    problem = toy_problem(10_000)
    started = time.process_time()
    assert problem.feasible(StochasticDowngrade().repair(problem, problem.space.largest))
    assert time.process_time() - started < 20
