from __future__ import annotations

import time

import numpy as np
import pytest
from searcher_toys import proposer_of

from qratk.core import KNOBS, Configuration, Importance, Problem
from qratk.searchers._warm_start import greedy_fill, initial_candidates, prototypes, uniforms_that_fit
from qratk.testing import toy_problem

EPSILON = 0.1


def naive_fill(problem: Problem, configuration: Configuration) -> Configuration:
    """Every affordable single step up priced anew in every round."""
    while True:
        options = []
        for layer in range(problem.num_layers):
            for column, knob in enumerate(KNOBS):
                higher = problem.space.step(configuration, layer, knob, 1)
                if higher is not None and problem.feasible(higher):
                    added = problem.bytes(higher) - problem.bytes(configuration)
                    worth = (problem.normalised_importance[knob][layer] + EPSILON) / added
                    options.append((-worth, added, layer, column, higher))
        if not options:
            return configuration
        configuration = min(options, key=lambda option: option[:4])[4]


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"num_layers": 1},
        {"num_layers": 9, "seed": 1, "bits": (2, 3, 4, 8, 16), "ranks": (0, 4, 8, 16)},
        {"num_layers": 8, "seed": 2, "like": (4, 4)},
        {"num_layers": 8, "seed": 3, "like": (8, 8), "max_average_bits": 3.3},
        {"like": (8, 16)},
        {"like": (2, 4)},
    ],
)
def test_greedy_fill_agrees_with_the_naive_loop(case):
    problem = toy_problem(**{"num_layers": 6, **case})
    smallest = problem.space.smallest
    assert greedy_fill(problem, smallest, epsilon=EPSILON) == naive_fill(problem, smallest)


def test_nothing_more_is_affordable_after_a_fill():
    problem = toy_problem(8, seed=5)
    for prototype in prototypes(problem, epsilon=EPSILON):
        assert problem.feasible(prototype)
        ups = [problem.space.step(prototype, layer, knob, 1) for layer in range(8) for knob in KNOBS]
        assert not any(problem.feasible(higher) for higher in ups if higher is not None)


def test_more_important_layer_of_equal_size_never_ends_lower():
    for seed in range(5):
        plain = toy_problem(12, seed)
        memory = type(plain.memory)(plain.space, (plain.memory.layers[0],) * 12, (plain.memory.parameters[0],) * 12)
        rng = np.random.default_rng(seed)
        scores = tuple(rng.random(12).tolist()), tuple(rng.random(12).tolist())
        for like in ((2, 16), (4, 4), (4, 16), (8, 4)):
            budget = type(plain.budget)(memory.bytes(plain.space.uniform(*like)))
            problem = Problem(plain.shapes, memory, budget, Importance(*scores))
            for filled in prototypes(problem, epsilon=EPSILON):
                for values, knob_scores in ((filled.bits, scores[0]), (filled.ranks, scores[1])):
                    ordered = [values[i] for i in np.argsort(knob_scores)]
                    assert ordered == sorted(ordered)


def test_prototypes_differ_in_their_ranks():
    problem = toy_problem(16)
    ranks = {round(problem.memory.average_rank(p)) for p in prototypes(problem, epsilon=EPSILON)}
    assert min(ranks) < 8
    assert max(ranks) == 16


def test_uniforms_that_fit_are_exactly_the_feasible_ones():
    problem = toy_problem(4, like=(4, 8))
    assert set(uniforms_that_fit(problem)) == {c for c in problem.space.uniforms() if problem.feasible(c)}


def candidates(problem: Problem, size: int, known=()):
    rng = np.random.default_rng(0)
    return initial_candidates(proposer_of(problem), rng, size=size, epsilon=EPSILON, known=known)


def test_prototypes_come_first_then_uniforms_then_variants():
    origins = [candidate.origin.split(":")[0] for candidate in candidates(toy_problem(12), 25)]
    assert origins[0] == "prototype"
    assert list(dict.fromkeys(origins)) == ["prototype", "uniform", "perturbed"]
    assert len(origins) == 25


def test_long_ladders_leave_room_for_variants():
    problem = toy_problem(12, bits=(2, 3, 4, 5, 6, 8, 16), ranks=(0, 2, 4, 8, 16, 32), like=(8, 2))
    origins = [candidate.origin.split(":")[0] for candidate in candidates(problem, 12)]
    assert origins.count("prototype") == 6
    assert origins.count("uniform") == 3
    assert origins.count("perturbed") == 3


def test_known_configurations_are_left_out():
    problem = toy_problem(12)
    known = {candidate.configuration for candidate in candidates(problem, 12)}
    assert not known & {candidate.configuration for candidate in candidates(problem, 25, known)}


def test_ten_thousand_layers_are_filled_in_time_that_no_square_of_them_would_take():
    problem = toy_problem(10_000)
    started = time.process_time()
    filled = greedy_fill(problem, problem.space.smallest, epsilon=EPSILON)
    assert time.process_time() - started < 20
    assert problem.feasible(filled)
