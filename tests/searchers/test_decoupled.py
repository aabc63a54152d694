from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from searcher_toys import LADDER, ask_once, begun

from qratk.core import History, Problem
from qratk.core.errors import ConfigurationError
from qratk.core.problem import Importance
from qratk.programs.integer import adapter_gain, rounding_error
from qratk.searchers.decoupled import bits_then_ranks
from qratk.testing import toy_problem

ask = partial(ask_once, "decoupled")


def error_of(problem: Problem, bits) -> float:
    return sum(i * 4.0 ** (2 - b) for i, b in zip(problem.importance.bits, bits, strict=True))


def gain_of(problem: Problem, ranks) -> float:
    return sum(i * np.log2(1 + r) for i, r in zip(problem.importance.rank, ranks, strict=True))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", [{}, {"like": (4, 4)}, {"like": (8, 16), "max_average_bits": 3.5}])
def test_bits_and_then_ranks_are_the_best_by_brute_force(case, seed):
    problem = toy_problem(4, seed, **case)
    space, of = problem.space, type(problem.space.smallest).of
    for candidate in ask(problem):
        floor = int(candidate.origin.split(":")[1])
        found = candidate.configuration
        errors = [
            error_of(problem, bits)
            for bits in itertools.product(space.bits, repeat=4)
            if problem.feasible(of(bits, (floor,) * 4))
        ]
        assert error_of(problem, found.bits) == pytest.approx(min(errors), rel=1e-3)
        gains = [
            gain_of(problem, ranks)
            for ranks in itertools.product([r for r in space.ranks if r >= floor], repeat=4)
            if problem.feasible(of(found.bits, ranks))
        ]
        assert gain_of(problem, found.ranks) == pytest.approx(max(gains), rel=1e-3)
        assert min(found.ranks) >= floor


def test_every_rank_floor_that_fits_gives_a_candidate():
    assert [c.origin for c in ask(toy_problem(16, like=(4, 16)))] == ["decoupled:16", "decoupled:8", "decoupled:4"]
    assert [c.origin for c in ask(toy_problem(16, like=(2, 8)))] == ["decoupled:8", "decoupled:4"]


def test_floors_that_lead_to_the_same_configuration_give_one_candidate():
    problem = toy_problem(16, like=(2, 16))
    assert bits_then_ranks(problem, 16) == bits_then_ranks(problem, 8)
    assert [c.origin for c in ask(problem)] == ["decoupled:16", "decoupled:4"]


def test_no_more_candidates_than_asked_for():
    assert [c.origin for c in ask(toy_problem(8), offspring=1)] == ["decoupled:16"]


def test_one_rank_floor_is_kept_to():
    (candidate,) = ask(toy_problem(8), rank_floor=8)
    assert min(candidate.configuration.ranks) >= 8


def test_rank_floor_off_the_ladder_is_refused():
    with pytest.raises(ConfigurationError, match="rank_floor"):
        ask(toy_problem(8), rank_floor=5)


def test_one_generation_is_planned_and_made():
    searcher = begun("decoupled", toy_problem(8), offspring=6)
    assert searcher.planned_evaluations(LADDER, 2, 12) == searcher.planned_evaluations(LADDER, 2, 1)
    assert searcher.planned_evaluations(LADDER, 2, 0) == {100: 0, 300: 0, 900: 0}
    assert not searcher.finished
    assert searcher.ask(History(), np.random.default_rng(0))
    assert searcher.finished
    assert searcher.ask(History(), np.random.default_rng(0)) == ()


def test_the_lowest_floor_leaves_most_to_the_second_program():
    problem = toy_problem(8)
    (candidate,) = ask(problem, rank_floor="lowest")
    assert candidate.configuration == bits_then_ranks(problem, problem.space.ranks[0])


def test_without_the_second_program_ranks_are_uniform():
    for candidate in ask(toy_problem(8), raise_ranks=False):
        assert set(candidate.configuration.ranks) == {int(candidate.origin.split(":")[1])}


def measured(problem: Problem, costs: np.ndarray | None = None, gains: np.ndarray | None = None) -> Problem:
    """The problem with an importance that tells rungs apart."""
    tables = (None if table is None else tuple(map(tuple, table.tolist())) for table in (costs, gains))
    return replace(problem, importance=Importance(problem.importance.bits, problem.importance.rank, *tables))


def test_measured_costs_and_gains_take_the_place_of_the_formulas():
    rng, plain = np.random.default_rng(3), toy_problem(4, like=(4, 8))
    space, of = plain.space, type(plain.space.smallest).of
    costs, gains = rng.random((4, 3)), rng.random((4, 3)).cumsum(axis=1)
    problem = measured(plain, costs, gains)
    (found,) = (c.configuration for c in ask(problem, rank_floor=4))

    def worth(table: np.ndarray, knob: str, values: tuple[int, ...]) -> float:
        return sum(table[layer, space.ladder(knob).index(value)] for layer, value in enumerate(values))

    every = itertools.product(space.bits, repeat=4)
    lowest = min(worth(costs, "bits", bits) for bits in every if problem.feasible(of(bits, (4,) * 4)))
    assert worth(costs, "bits", found.bits) == pytest.approx(lowest, rel=1e-3)
    every = itertools.product(space.ranks, repeat=4)
    most = max(worth(gains, "rank", ranks) for ranks in every if problem.feasible(of(found.bits, ranks)))
    assert worth(gains, "rank", found.ranks) == pytest.approx(most, rel=1e-3)


def test_costs_that_follow_the_formula_give_what_it_gives_at_every_decay():
    plain = toy_problem(6)
    problem = measured(plain, rounding_error(plain), adapter_gain(plain))
    for decay in (1.0, 0.5):
        np.testing.assert_allclose(rounding_error(problem, decay), rounding_error(plain, decay))
    np.testing.assert_allclose(adapter_gain(problem), adapter_gain(plain))


def test_costs_of_a_layer_without_any_stay_zero():
    problem = measured(toy_problem(2), np.array([[0.0, 0.0, 0.0], [4.0, 1.0, 0.0]]))
    np.testing.assert_allclose(rounding_error(problem, 0.5), [[0.0, 0.0, 0.0], [4.0, 2.0, 0.0]])
