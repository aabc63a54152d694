from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest
from searcher_toys import LADDER, ask_once, begun

from qratk.core import History, Problem
from qratk.core.errors import ConfigurationError
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
