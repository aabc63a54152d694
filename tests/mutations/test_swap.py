from __future__ import annotations

import numpy as np
import pytest

from qratk.core import Configuration, Importance, Problem
from qratk.core.edits import DEFAULT_EPSILON, weights_of_layers
from qratk.core.errors import ConfigurationError
from qratk.core.memory import LayerBytes, LayerShape, MemoryModel, resolve_budget
from qratk.core.space import SearchSpace
from qratk.mutations.swap import LevelSwitch
from qratk.testing import toy_problem


def equal_layers(num_layers: int = 4, *, bits=(2, 4, 8), ranks=(4, 8, 16), importance=None, **budget) -> Problem:
    """Problem whose layers all have one size, so that a step down pays exactly for a step up."""
    shapes = tuple(LayerShape(f"layers.{i}", (("attention", 256, 256),)) for i in range(num_layers))
    space = SearchSpace(tuple(bits), tuple(ranks), tuple(shape.name for shape in shapes))
    layer = LayerBytes(
        weights={b: 256 * 256 * b // 8 for b in bits},
        metadata={b: 4096 if b < 16 else 0 for b in bits},
        adapters={r: 1024 * r for r in ranks},
    )
    memory = MemoryModel(space, (layer,) * num_layers, tuple(shape.parameters for shape in shapes))
    scores = tuple(range(num_layers)) if importance is None else tuple(importance)
    budget = resolve_budget(memory, **(budget or {"like": (bits[-1], ranks[-1])}))
    return Problem(shapes, memory, budget, Importance(scores, scores[::-1]))


def switched(problem: Problem, start: Configuration, draws: int = 400) -> list[Configuration]:
    operator, rng = LevelSwitch(), np.random.default_rng(0)
    return [operator.mutate(problem, start, rng) for _ in range(draws)]


def test_layers_of_one_size_keep_their_bytes_exactly():
    problem = equal_layers()
    start = Configuration.of([4, 4, 8, 2], [8, 4, 16, 8])
    results = switched(problem, start)
    assert {problem.bytes(result) for result in results} <= {problem.bytes(start)}
    assert len(set(results)) > 5


@pytest.mark.parametrize("seed", range(4))
def test_bytes_never_grow_and_the_budget_holds_whatever_the_sizes(seed):
    problem, rng = toy_problem(8, seed), np.random.default_rng(seed)
    starts = [problem.space.random(rng) for _ in range(40)]
    for start in starts:
        for result in switched(problem, start, 10):
            assert problem.bytes(result) <= problem.bytes(start)
            assert problem.feasible(result) or not problem.feasible(start)


def test_average_bits_never_grow_where_metadata_would_pay_for_more():
    """16 bits have no scales: by bytes alone, a step to 16 costs less than the weighted bits it adds."""
    problem = equal_layers(24, bits=(7, 8, 16), max_average_bits=8.01)
    start = problem.space.uniform(8, 8)
    for result in switched(problem, start, 200):
        assert problem.feasible(result)
        assert np.mean(result.bits) <= 8.0


def test_one_knob_of_one_layer_goes_up_and_the_same_knob_goes_down_elsewhere():
    problem = equal_layers()
    start = problem.space.uniform(4, 8)
    for result in switched(problem, start):
        change = problem.space.indices(result) - problem.space.indices(start)
        column = int(np.argmax(change.max(axis=0)))
        assert change[:, 1 - column].tolist() == [0] * 4
        assert sorted(change[:, column])[-1] == 1
        assert (change[:, column] > 0).sum() == 1


def test_two_small_steps_pay_for_a_large_one():
    problem = equal_layers(3)
    start = problem.space.uniform(4, 4)  # ranks cannot go down: 4 to 8 bits costs what two steps to 2 bits save
    assert {str(result.bits) for result in switched(problem, start)} == {"(8, 2, 2)", "(2, 8, 2)", "(2, 2, 8)"}


def test_smallest_step_that_pays_is_preferred():
    problem = equal_layers(3, importance=(1.0, 1.0, 1.0))
    start = Configuration.of([2, 4, 8], [4, 4, 4])
    ups = {result.bits for result in switched(problem, start) if result.bits[0] > 2}
    assert ups == {(4, 2, 8)}  # the step from 8 to 4 would save twice what is owed


def test_layers_are_drawn_by_importance_up_and_inversely_down():
    problem = equal_layers(4, importance=(0.0, 1.0, 2.0, 4.0))
    start = Configuration.of([2, 2, 2, 2], [4, 4, 4, 4]).replace(1, bits=4).replace(2, bits=4)
    weights = weights_of_layers(problem, DEFAULT_EPSILON)[:, 0] ** 1.5
    up_of_lowest = [r.bits for r in switched(problem, start, 4000) if (r.bits[0], r.bits[3]) == (4, 2)]
    up_of_highest = [r.bits for r in switched(problem, start, 4000) if (r.bits[0], r.bits[3]) == (2, 4)]
    expected = weights[3] / (weights[0] + weights[3])
    total = len(up_of_lowest) + len(up_of_highest)
    assert abs(len(up_of_highest) / total - expected) < 0.03
    paid_by_1 = sum(bits[1] == 2 for bits in up_of_highest) / len(up_of_highest)
    assert abs(paid_by_1 - weights[2] / (weights[1] + weights[2])) < 0.04


def test_nothing_is_switched_where_nobody_can_pay():
    problem = equal_layers(3)
    for start in (problem.space.smallest, problem.space.largest):
        assert set(switched(problem, start, 20)) == {start}


@pytest.mark.parametrize("options", [{"gamma": 0.0}, {"epsilon": -1.0}, {"tolerance": -0.1}])
def test_senseless_options_are_refused(options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        LevelSwitch(**options)
