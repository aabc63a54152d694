from __future__ import annotations

import itertools
import math

import moocore
import numpy as np
import pytest
from pymoo.core.population import Population
from pymoo.core.problem import Problem
from pymoo.operators.survival.rank_and_crowding import RankAndCrowding
from pymoo.problems import get_problem

from qratk.core import Configuration, hypervolume_2d
from qratk.searchers._survival import Member, non_dominated_fronts, survivors
from qratk.testing import toy_problem


def member(index: int, score: float | None, size: int = 1, steps: int = 100, violation: float = 0.0) -> Member:
    return Member(Configuration.of([4], [index]), steps, score, size, violation)


def random_members(rng: np.random.Generator, count: int, levels: int = 10, steps: int = 100) -> list[Member]:
    scores, sizes = rng.integers(levels, size=count), rng.integers(1, levels, size=count)
    return [
        member(steps * 1000 + i, float(s), int(b), steps) for i, (s, b) in enumerate(zip(scores, sizes, strict=True))
    ]


@pytest.mark.parametrize("levels", [3, 10, 1000])
def test_fronts_agree_with_moocore(levels):
    rng = np.random.default_rng(levels)
    for count in (1, 2, 10, 60):
        members = random_members(rng, count, levels)
        points = np.array([[-m.score, m.bytes] for m in members])
        expected = moocore.pareto_rank(points)
        for rank, front in enumerate(non_dominated_fronts(members)):
            assert {m.configuration for m in front} == {
                m.configuration for m, r in zip(members, expected, strict=True) if r == rank
            }


def population(name: str, count: int, seed: int) -> list[Member]:
    """Random points of one of pymoo's test problems: the first objective as negated score, the second as bytes."""
    rng = np.random.default_rng(seed)
    points = get_problem(name).evaluate(rng.random((count, 30)))
    return [member(i, -float(a), round(float(b) * 1e9)) for i, (a, b) in enumerate(points)]


@pytest.mark.parametrize("name", ["zdt1", "zdt2", "zdt3"])
def test_survival_agrees_with_pymoo_on_its_test_problems(name):
    for seed, size in itertools.product(range(3), (10, 25, 40)):
        members = population(name, 60, seed)
        objectives = np.array([[-m.score, m.bytes] for m in members])
        whole = Population.new(X=np.arange(60)[:, None].astype(float), F=objectives)
        expected = RankAndCrowding().do(Problem(n_var=1, n_obj=2), whole, n_survive=size)
        # Both extremes of a front are infinitely far out: which of them is cut, when only one place is left, is a draw.
        merits = [(m.rank, m.crowding) for m in survivors(members, size)]
        theirs = zip(expected.get("rank").tolist(), expected.get("crowding").tolist(), strict=True)
        np.testing.assert_allclose(sorted(merits), sorted(theirs))


@pytest.mark.parametrize(("name", "area"), [("zdt1", 2 / 3), ("zdt2", 1 / 3)])
def test_hypervolume_of_known_fronts_is_the_integral_and_what_moocore_says(name, area):
    front = get_problem(name).pareto_front(n_pareto_points=2000)
    found = hypervolume_2d(map(tuple, front), (1.0, 1.0))
    assert found == pytest.approx(area, abs=1e-3)
    assert found == pytest.approx(moocore.hypervolume(front, ref=[1.0, 1.0]))
    cloud = get_problem(name).evaluate(np.random.default_rng(0).random((200, 30)))
    expected = moocore.hypervolume(cloud, ref=[1.0, 4.0])
    assert hypervolume_2d(map(tuple, cloud), (1.0, 4.0)) == pytest.approx(expected)


def test_higher_rung_outranks_any_score_below():
    low, high = member(1, 100.0, 1, steps=100), member(2, 0.0, 9, steps=900)
    assert [m.configuration for m in survivors([low, high], 2)] == [high.configuration, low.configuration]


def test_one_configuration_counts_at_its_highest_rung_only():
    first, later = member(1, 5.0, steps=100), member(1, 1.0, steps=900)
    (kept,) = survivors([first, later], 10)
    assert (kept.steps, kept.score) == (900, 1.0)


def test_failed_and_infeasible_come_last():
    failed, over, further = member(1, None, steps=900), member(2, 9.0, violation=0.1), member(3, 9.0, violation=0.5)
    poor = member(4, -100.0, 99)
    ordered = survivors([failed, further, over, poor], 4)
    assert [m.configuration for m in ordered] == [m.configuration for m in (poor, over, further, failed)]
    assert [m.rank for m in ordered] == [0, 1, 2, 3]


def test_promoted_candidate_that_failed_is_dominated_by_all():
    fine_at_first, failed_later = member(1, 5.0, steps=100), member(1, None, steps=900)
    other = member(2, -5.0, steps=100)
    assert [m.configuration for m in survivors([fine_at_first, failed_later, other], 1)] == [other.configuration]


def test_extremes_of_the_first_front_survive_a_cut():
    members = [member(i, float(i), i + 1) for i in range(20)]
    kept = survivors(members, 5)
    assert {m.score for m in kept} >= {0.0, 19.0}
    assert len(kept) == 5


def test_crowded_members_are_cut_first():
    members = [member(i, score, int(score * 10) + 1) for i, score in enumerate([0.0, 4.9, 5.0, 5.1, 10.0])]
    assert {m.score for m in survivors(members, 3)} >= {0.0, 10.0}
    assert 5.0 not in {m.score for m in survivors(members, 4)}


def test_ranks_ascend_over_rungs():
    rng = np.random.default_rng(0)
    members = random_members(rng, 15, steps=100) + random_members(rng, 5, steps=900)
    kept = survivors(members, 20)
    assert [m.rank for m in kept] == sorted(m.rank for m in kept)
    worst_high = max(m.rank for m in kept if m.steps == 900)
    assert worst_high < min(m.rank for m in kept if m.steps == 100)


def test_member_survives_plain_data():
    problem = toy_problem(3)
    original = Member(
        problem.space.uniform(4, 8), 100, 0.5, problem.bytes(problem.space.uniform(4, 8)), 0.0, 2, math.inf
    )
    assert Member.from_plain(original.to_plain(), problem) == original
