"""Candidate pools against brute force (Eq. 14, 15)."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from refiner_toys import AnyStep, LowerLast, toy_problem, toy_proposer

from qratk.core import Configuration, SearchSpace
from qratk.core.errors import RejectedConfigurationError
from qratk.core.problem import Problem
from qratk.mutations.proposer import Proposer
from qratk.refiners._pool import ball, ball_size, embed, pool, sampled_ball

SPACE = SearchSpace((2, 4, 8), (4, 8, 16, 32), ("a", "b"))


def everything(space: SearchSpace) -> list[Configuration]:
    rungs = [range(len(space.bits)), range(len(space.ranks))] * space.num_layers
    return [space.from_indices(np.array(i).reshape(-1, 2)) for i in itertools.product(*rungs)]


@pytest.mark.parametrize("radius", range(9))
@pytest.mark.parametrize("centre", [SPACE.uniform(2, 4), SPACE.uniform(4, 8), Configuration.of([8, 2], [32, 8])])
def test_ball_holds_exactly_what_is_within_the_radius(centre: Configuration, radius: int) -> None:
    near = [c for c in everything(SPACE) if SPACE.atomic_distance(c, centre) <= radius]
    found = list(ball(SPACE, centre, radius))
    assert sorted([*found, centre]) == sorted(near)
    assert ball_size(SPACE, centre, radius) == len(near)


def test_ball_size_of_a_deep_model_is_counted_without_listing() -> None:
    space = SearchSpace((2, 4, 8), (4, 8, 16), tuple(map(str, range(80))))
    # From the middle: 160 knobs, each with one rung below and one above.
    assert ball_size(space, space.uniform(4, 8), 2) == 1 + 2 * 160 + 4 * (160 * 159 // 2)


@pytest.mark.parametrize("radius", [1, 2, 5])
def test_sampled_members_are_different_and_within_the_radius(radius: int) -> None:
    problem = toy_problem(8)
    centre = problem.space.uniform(4, 8)
    members = list(sampled_ball(toy_proposer(problem), centre, radius, size=60, rng=np.random.default_rng(0)))
    distances = [problem.space.atomic_distance(member, centre) for member in members]
    assert len(set(members)) == len(members)
    assert set(distances) == set(range(1, radius + 1))


def test_sampled_ball_is_no_larger_than_asked() -> None:
    problem = toy_problem(8)
    members = sampled_ball(toy_proposer(problem), problem.space.uniform(4, 8), 4, size=25, rng=np.random.default_rng(0))
    assert len(list(members)) == 25


@pytest.mark.parametrize("size", [10, 5000])
def test_pool_fits_the_budget_and_lacks_what_is_excluded(size: int) -> None:
    problem = toy_problem(3)
    centre = LowerLast().repair(problem, problem.space.largest)
    rng = np.random.default_rng(0)
    whole = pool(toy_proposer(problem), centre, 2, size=size, excluded=(), rng=rng)
    assert whole
    assert len(set(whole)) == len(whole)
    assert all(problem.feasible(member) for member in whole)
    rest = pool(toy_proposer(problem), centre, 2, size=5000, excluded=set(whole), rng=rng)
    assert not set(rest) & set(whole)


def test_enumerated_pool_is_the_repaired_ball() -> None:
    problem = toy_problem(3)
    centre = LowerLast().repair(problem, problem.space.largest)
    near = [c for c in everything(problem.space) if 0 < problem.space.atomic_distance(c, centre) <= 2]
    expected = {LowerLast().repair(problem, c) for c in near} - {centre}
    found = pool(toy_proposer(problem), centre, 2, size=5000, excluded={centre}, rng=np.random.default_rng(0))
    assert set(found) == expected


def test_members_that_repair_rejects_are_left_out() -> None:
    class Reject(LowerLast):
        def repair(self, problem: Problem, configuration: Configuration) -> Configuration:
            if not problem.feasible(configuration):
                raise RejectedConfigurationError("no")
            return configuration

    problem = toy_problem(3)
    centre = LowerLast().repair(problem, problem.space.largest)
    proposer = Proposer(problem, (AnyStep(),), Reject())
    found = pool(proposer, centre, 2, size=5000, excluded=(), rng=np.random.default_rng(0))
    assert found
    assert all(problem.space.atomic_distance(c, centre) <= 2 and problem.feasible(c) for c in found)


@pytest.mark.parametrize("space", [SPACE, SearchSpace((4,), (0, 8), ("a", "b", "c"))])
def test_embedding_of_many_equals_that_of_each(space: SearchSpace) -> None:
    configurations = everything(space)
    np.testing.assert_array_equal(embed(space, configurations), [space.embed(c) for c in configurations])
