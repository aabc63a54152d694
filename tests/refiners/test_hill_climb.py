"""Hill climbing: neighbours against brute force, and where it stops."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from refiner_toys import LADDER, Bench, feasible_starts, smooth_score, toy_proposer
from refiner_toys import toy_problem as equal_layers

from qratk.core import Configuration, ConfigurationError, Problem
from qratk.core.edits import weights_of_layers
from qratk.refiners.base import refiners
from qratk.refiners.hill_climb import HillClimb, neighbours
from qratk.testing import RefinerContract, ToyEvaluator, toy_problem

HIGH = LADDER.highest
CASES = [{}, {"like": (4, 4)}, {"like": (8, 16)}, {"like": (8, 16), "max_average_bits": 3.5}, {"like": (2, 16)}]


class TestHillClimbContract(RefinerContract):
    @pytest.fixture
    def make(self) -> Callable[[], HillClimb]:
        return lambda: refiners.create("hill_climb", max_evaluations=4)


def feasible(problem: Problem, count: int) -> list[Configuration]:
    proposer = toy_proposer(problem)
    rng = np.random.default_rng(0)
    return [c for _ in range(count) if (c := proposer.repaired(problem.space.random(rng))) is not None]


def singles_and_swaps(problem: Problem, centre: Configuration) -> set[Configuration]:
    """Feasible configurations one edit away, and those an edit up and an edit down away whose edit up does not fit."""
    space = problem.space
    steps = {
        (layer, knob, direction): space.step(centre, layer, knob, direction)
        for layer, knob, direction in itertools.product(range(problem.num_layers), ("bits", "rank"), (-1, 1))
    }
    found = {c for c in steps.values() if c is not None and problem.feasible(c)}
    for (layer, knob, direction), higher in steps.items():
        if direction < 0 or higher is None or problem.feasible(higher):
            continue
        for other, other_knob in itertools.product(range(problem.num_layers), ("bits", "rank")):
            swapped = space.step(higher, other, other_knob, -1)
            if (other, other_knob) != (layer, knob) and swapped is not None and problem.feasible(swapped):
                found.add(swapped)
    return found


@pytest.mark.parametrize("case", CASES)
def test_neighbours_hold_all_single_edits_and_swaps_that_fit(case: dict[str, Any]) -> None:
    problem = toy_problem(4, **case)
    for centre in feasible(problem, 10):
        found = [configuration for configuration, _ in neighbours(problem, centre, 0.1)]
        assert len(set(found)) == len(found)
        assert centre not in found
        assert all(problem.feasible(c) for c in found)
        near = {c for c in found if problem.space.atomic_distance(c, centre) <= 2}
        assert near == singles_and_swaps(problem, centre)


@pytest.mark.parametrize("case", CASES)
def test_neighbours_come_by_the_importance_that_they_gain(case: dict[str, Any]) -> None:
    problem = toy_problem(5, 1, **case)
    weights = weights_of_layers(problem, 0.1)
    for centre in feasible(problem, 5):
        found = list(neighbours(problem, centre, 0.1))
        for configuration, gain in found:
            moved = problem.space.indices(configuration) - problem.space.indices(centre)
            assert gain == pytest.approx(float((weights * moved).sum()))
        gains = [gain for _, gain in found]
        assert gains == sorted(gains, reverse=True)


def test_a_step_that_takes_two_others_to_pay_for_is_a_neighbour() -> None:
    problem = equal_layers(3, 1.0)
    centre = Configuration.of([4, 4, 4], [4, 4, 4])
    tight = Problem(problem.shapes, problem.memory, type(problem.budget)(problem.bytes(centre)), problem.importance)
    found = {str(configuration) for configuration, _ in neighbours(tight, centre, 0.1)}
    assert "2:4*2 8:4" in found  # 400 bytes up, 200 down twice
    assert not any(c for c in found if "8:" in c and c.count("2:") == 0)


def climbing(bench: Bench, starts: list[Configuration], **options: Any) -> HillClimb:
    refiner = refiners.create("hill_climb", **options)
    utility = bench.start(starts)
    refiner.begin(toy_proposer(bench.problem), bench.ladder, utility, bench.history)
    return refiner


def test_the_end_is_a_local_optimum() -> None:
    problem = equal_layers(4)
    bench = Bench(problem, smooth_score(problem))
    refiner = climbing(bench, feasible_starts(problem, 3, 0), max_evaluations=500)
    bench.run(refiner, np.random.default_rng(0), limit=501)
    assert "local optimum" in refiner.stop_reason
    best = bench.history.best(HIGH)
    assert best is not None
    assert all(bench.score(c) <= best.score for c, _ in neighbours(problem, best.configuration, 0.1))


def test_the_first_improvement_is_the_next_centre() -> None:
    problem = equal_layers(4)
    bench = Bench(problem, smooth_score(problem))
    refiner, rng = climbing(bench, feasible_starts(problem, 3, 0), max_evaluations=30), np.random.default_rng(0)
    moved = 0
    while not refiner.finished:
        best = max(bench.history.at(HIGH), key=lambda e: (e.score, -problem.bytes(e.configuration)))
        for request in bench.step(refiner, rng):
            assert request.candidate.parents == (best.configuration.digest,)
            moved += bench.score(request.configuration) > best.score
    assert moved >= 2


def test_brute_force_optimum_is_found_on_small_landscapes() -> None:
    hits = 0
    for seed in range(5):
        evaluator = ToyEvaluator(4, seed, noise=0.0)
        problem = evaluator.problem(like=(4, 4))
        optimum, _ = evaluator.optimum(problem.space, problem.budget)
        bench = Bench(problem, lambda c, e=evaluator: e.landscape.true_score(c, 900))
        starts = [c for c in problem.space.uniforms() if problem.feasible(c)]
        bench.run(climbing(bench, starts, max_evaluations=200), np.random.default_rng(0), limit=201)
        best = bench.history.best(HIGH)
        hits += best is not None and best.configuration == optimum
    assert hits >= 4


def test_stops_at_the_cap() -> None:
    problem = equal_layers(4)
    bench = Bench(problem, smooth_score(problem))
    refiner = climbing(bench, feasible_starts(problem, 3, 0), max_evaluations=2)
    assert len(bench.run(refiner, np.random.default_rng(0))) == 2
    assert "cap of 2" in refiner.stop_reason


@pytest.mark.parametrize("options", [{"max_evaluations": -1}, {"epsilon": 0.0}])
def test_options_of_the_climb_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        refiners.create("hill_climb", **options)
