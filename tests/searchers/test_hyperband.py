from __future__ import annotations

import json

import numpy as np
import pytest
from searcher_toys import LADDER, ONE_RUNG, begun

from qratk.core import FidelityLadder, History
from qratk.core.errors import ConfigurationError
from qratk.searchers.base import searchers
from qratk.searchers.brackets import bracket_size, cost, halving
from qratk.testing import toy_problem

LADDERS = [LADDER, FidelityLadder((10, 20, 40, 80, 160), 2.0), ONE_RUNG, FidelityLadder((50, 75), 4.0)]


def test_brackets_of_the_known_example():
    # 27 at 100 steps, 9 more for 200, 3 for 600: 6300 steps. 12 * 300 + 4 * 600 = 6000; 7 * 900 = 6300.
    assert halving(LADDER, 27, 0) == ((100, 27), (300, 9), (900, 3))
    assert [bracket_size(LADDER, 27, rung) for rung in range(3)] == [27, 12, 7]
    assert halving(LADDER, 12, 1) == ((300, 12), (900, 4))
    assert halving(LADDER, 7, 2) == ((900, 7),)
    assert [cost(halving(LADDER, n, rung)) for rung, n in enumerate((27, 12, 7))] == [6300, 6000, 6300]


@pytest.mark.parametrize("ladder", LADDERS)
@pytest.mark.parametrize("offspring", [1, 2, 7, 25, 81])
def test_no_bracket_takes_more_steps_than_the_first_and_one_candidate_more_would(ladder, offspring):
    allowed = cost(halving(ladder, offspring, 0))
    for first in range(len(ladder.steps)):
        size = bracket_size(ladder, offspring, first)
        assert 1 <= size <= offspring
        assert size == 1 or cost(halving(ladder, size, first)) <= allowed
        assert size == offspring or cost(halving(ladder, size + 1, first)) > allowed


def test_cost_counts_only_the_steps_run_on():
    assert cost(((100, 9), (300, 3), (900, 1))) == 9 * 100 + 3 * 200 + 1 * 600


@pytest.mark.parametrize("name", ["hyperband", "bohb"])
@pytest.mark.parametrize("ladder", LADDERS)
def test_brackets_cycle_over_generations_as_planned(name, ladder):
    searcher, rng = begun(name, toy_problem(12), ladder, offspring=9), np.random.default_rng(0)
    made = dict.fromkeys(ladder.steps, 0)
    for generation in range(5):
        candidates = searcher.ask(History(), rng)
        schedule = searcher.schedule(ladder, len(candidates), 3)
        assert schedule[0] == (ladder.steps[generation % len(ladder.steps)], len(candidates))
        assert schedule[-1][0] == ladder.highest
        for steps, size in schedule:
            made[steps] += size
        searcher.tell([])
    assert made == searcher.planned_evaluations(ladder, 3, 5)


def test_schedule_is_right_after_a_restore_between_ask_and_tell():
    problem, rng = toy_problem(12), np.random.default_rng(0)
    searcher = begun("hyperband", problem, offspring=9)
    for _ in range(4):
        candidates = searcher.ask(History(), rng)
        expected = searcher.schedule(LADDER, len(candidates), 3)
        state = json.loads(json.dumps(searcher.state()))
        searcher = begun("hyperband", problem, offspring=9)
        searcher.restore(state)
        assert searcher.schedule(LADDER, len(candidates), 3) == expected
        searcher.tell([])


def test_fewer_candidates_than_asked_for_are_halved_from_their_own_number():
    assert searchers.create("hyperband", offspring=27).schedule(LADDER, 5, 3) == ((100, 5), (300, 2), (900, 1))


@pytest.mark.parametrize("name", ["hyperband", "bohb"])
def test_no_offspring_is_refused(name):
    with pytest.raises(ConfigurationError):
        searchers.create(name, offspring=0)
