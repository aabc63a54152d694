from __future__ import annotations

import time

import numpy as np
import pytest

from qratk.core import KNOBS, Budget, Configuration, Importance, Problem, RejectedConfigurationError
from qratk.core.errors import ConfigurationError
from qratk.repairs.greedy import GreedyDowngrade
from qratk.repairs.reject import RejectInfeasible
from qratk.testing import toy_problem

EPSILON = 0.1


def naive_repair(problem: Problem, configuration: Configuration) -> Configuration:
    """Eq. 7-8 word by word: every downgrade priced anew in every round; the cap on the average bits first."""
    memory, cap = problem.memory, problem.budget.max_average_bits
    while not problem.feasible(configuration):
        over_cap = cap is not None and memory.average_bits(configuration) > cap * (1 + 1e-12)
        options = []
        for layer in range(problem.num_layers):
            for column, knob in enumerate(KNOBS):
                lower = problem.space.step(configuration, layer, knob, -1)
                if lower is None:
                    continue
                saved = problem.bytes(configuration) - problem.bytes(lower)
                if over_cap:
                    bits = configuration.layers[layer].bits - lower.layers[layer].bits
                    saved = bits * memory.parameters[layer]
                if saved > 0:
                    cost = (problem.normalised_importance[knob][layer] + EPSILON) / saved
                    options.append((cost, -saved, layer, column, lower))
        configuration = min(options, key=lambda option: option[:4])[4]
    return configuration


CASES = [
    {},
    {"num_layers": 1, "like": (2, 8)},
    {"num_layers": 9, "seed": 1, "bits": (2, 3, 4, 8, 16), "ranks": (0, 4, 8, 16)},
    {"num_layers": 7, "seed": 2, "like": (2, 8)},
    {"num_layers": 8, "seed": 3, "like": (8, 8), "max_average_bits": 3.3},
    {"num_layers": 8, "seed": 4, "like": (4, 4), "max_average_bits": 3.9},
]


@pytest.mark.parametrize("case", CASES)
def test_greedy_repair_agrees_with_the_naive_loop(case):
    problem = toy_problem(**{"num_layers": 5, **case})
    rng = np.random.default_rng(0)
    for configuration in (problem.space.largest, *(problem.space.random(rng) for _ in range(15))):
        assert GreedyDowngrade(EPSILON).repair(problem, configuration) == naive_repair(problem, configuration)


@pytest.mark.parametrize("scope", ["training", "serving"])
def test_greedy_repair_agrees_with_the_naive_loop_in_other_scopes(scope):
    plain = toy_problem(6)
    limit = plain.memory.bytes(plain.space.uniform(4, 8), scope)
    problem = Problem(plain.shapes, plain.memory, Budget(limit, scope), plain.importance)
    assert GreedyDowngrade(EPSILON).repair(problem, plain.space.largest) == naive_repair(problem, plain.space.largest)


def equal_layers(limit_under_largest: int) -> Problem:
    """Two layers alike in everything, and a budget so many bytes under the largest configuration."""
    plain = toy_problem(2, seed=4)
    memory = type(plain.memory)(plain.space, (plain.memory.layers[0],) * 2, (plain.memory.parameters[0],) * 2)
    limit = memory.bytes(plain.space.largest) - limit_under_largest
    return Problem(plain.shapes, memory, Budget(limit), Importance.uniform(2))


def test_ties_go_to_the_lower_layer():
    problem = equal_layers(1)
    repaired = GreedyDowngrade().repair(problem, problem.space.largest)
    assert [a != b for a, b in zip(repaired.layers, problem.space.largest.layers, strict=True)] == [True, False]


def test_budget_scaled_by_a_bit_step_costs_one_bit_step():
    problem = equal_layers(1)
    repaired = GreedyDowngrade().repair(problem, problem.space.largest)
    assert repaired == problem.space.largest.replace(0, bits=4)


def test_less_important_layer_is_lowered_first():
    problem = equal_layers(1)
    scored = Problem(problem.shapes, problem.memory, problem.budget, Importance((5.0, 1.0), (1.0, 1.0)))
    repaired = GreedyDowngrade().repair(scored, problem.space.largest)
    assert repaired == problem.space.largest.replace(1, bits=4)


def test_cap_on_bits_leaves_ranks_alone():
    problem = toy_problem(6, like=(8, 16), max_average_bits=4)
    repaired = GreedyDowngrade().repair(problem, problem.space.largest)
    assert repaired.ranks == problem.space.largest.ranks
    assert problem.memory.average_bits(repaired) <= 4


def test_ladder_whose_lower_rung_is_larger_is_survived():
    """Packed 3-bit words can take more than 4 bits on small layers: that step down saves nothing."""
    plain = toy_problem(3, bits=(2, 3, 4), ranks=(4,), like=(4, 4))
    layers = tuple(
        type(layer)({**layer.weights, 3: layer.weights[4] + 1000}, layer.metadata, layer.adapters)
        for layer in plain.memory.layers
    )
    memory = type(plain.memory)(plain.space, layers, plain.memory.parameters)
    budget = Budget(memory.bytes(plain.space.uniform(2, 4)) + 10)
    problem = Problem(plain.shapes, memory, budget, plain.importance)
    for configuration in (plain.space.largest, plain.space.uniform(3, 4)):
        assert problem.feasible(GreedyDowngrade().repair(problem, configuration))


def test_ten_thousand_layers_are_repaired_in_time_that_no_square_of_them_would_take():
    problem = toy_problem(10_000)
    started = time.process_time()
    repaired = GreedyDowngrade().repair(problem, problem.space.largest)
    assert time.process_time() - started < 20
    assert problem.feasible(repaired)


def test_epsilon_must_be_positive():
    with pytest.raises(ConfigurationError, match="epsilon"):
        GreedyDowngrade(epsilon=0.0)


def test_reject_declines_what_does_not_fit():
    problem = toy_problem(4)
    with pytest.raises(RejectedConfigurationError, match="propose another"):
        RejectInfeasible().repair(problem, problem.space.largest)
