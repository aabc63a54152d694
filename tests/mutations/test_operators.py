from __future__ import annotations

import time

import numpy as np
import pytest

from qratk.core import Configuration, Importance, Problem
from qratk.core.edits import DEFAULT_EPSILON, Ledger, weights_of_layers
from qratk.core.errors import ConfigurationError
from qratk.mutations._draws import draw
from qratk.mutations.base import mutations
from qratk.mutations.coupled import MemoryBalancedCoupled
from qratk.mutations.sensitivity import SensitivityGuided
from qratk.mutations.uniform import UniformEdit
from qratk.testing import toy_problem

DRAWS = 2000


def with_importance(problem: Problem, bits, rank) -> Problem:
    return Problem(problem.shapes, problem.memory, problem.budget, Importance(tuple(bits), tuple(rank)))


@pytest.fixture
def problem():
    return with_importance(toy_problem(4), (0.0, 1.0, 2.0, 4.0), (3.0, 0.0, 1.0, 2.0))


def edits(operator, problem: Problem, start: Configuration) -> dict[tuple[str, int], np.ndarray]:
    """How often each (knob, direction) edited each layer, (L,)."""
    rng = np.random.default_rng(0)
    counts = {(knob, d): np.zeros(problem.num_layers) for knob in ("bits", "rank") for d in (-1, 1)}
    for _ in range(DRAWS):
        change = problem.space.indices(operator.mutate(problem, start, rng)) - problem.space.indices(start)
        for layer, column in np.argwhere(change):
            counts[("bits", "rank")[column], int(np.sign(change[layer, column]))][layer] += 1
    return counts


def assert_frequencies(counts: np.ndarray, weights: np.ndarray) -> None:
    """Within five standard deviations of a multinomial draw."""
    share, n = weights / weights.sum(), counts.sum()
    np.testing.assert_array_less(np.abs(counts - n * share), 5 * np.sqrt(n * share * (1 - share)) + 1)


@pytest.mark.parametrize(("direction", "sign"), [("directed", -1), ("either", 1)])
def test_sensitivity_draws_layers_as_in_eq_9(problem, direction, sign):
    operator = SensitivityGuided(gamma=1.5, direction=direction)
    counts = edits(operator, problem, problem.space.uniform(4, 8))
    weights = weights_of_layers(problem, DEFAULT_EPSILON)
    for column, knob in enumerate(("bits", "rank")):
        assert_frequencies(counts[knob, 1], weights[:, column] ** 1.5)
        assert_frequencies(counts[knob, -1], weights[:, column] ** (sign * 1.5))


def test_sensitivity_edits_one_knob_by_one_step(problem):
    rng = np.random.default_rng(0)
    start = problem.space.uniform(4, 8)
    for _ in range(50):
        assert problem.space.atomic_distance(start, SensitivityGuided().mutate(problem, start, rng)) == 1


def test_uniform_draws_all_possible_edits_equally(problem):
    start = Configuration.of([2, 4, 8, 4], [4, 8, 16, 8])
    counts = edits(UniformEdit(), problem, start)
    assert_frequencies(np.concatenate([counts[key] for key in sorted(counts)]), possible_edits(problem, start))


def possible_edits(problem: Problem, start: Configuration) -> np.ndarray:
    keys = sorted((knob, d) for knob in ("bits", "rank") for d in (-1, 1))
    return np.array([
        float(problem.space.step(start, layer, knob, d) is not None) for knob, d in keys for layer in range(4)
    ])  # fmt: skip


def test_coupled_never_undoes_its_primary_edit(problem):
    """From the edge of the budget every result fits, and something is higher than before."""
    rng = np.random.default_rng(0)
    start = problem.space.uniform(4, 16)
    assert problem.budget.limit_bytes == problem.bytes(start)
    for _ in range(500):
        varied = MemoryBalancedCoupled().mutate(problem, start, rng)
        change = problem.space.indices(varied) - problem.space.indices(start)
        assert problem.feasible(varied)
        assert change.max() == 1
        assert (change > 0).sum() == 1


def test_coupled_pays_at_unimportant_layers(problem):
    counts = edits(MemoryBalancedCoupled(), problem, problem.space.uniform(4, 16))
    assert counts["bits", -1][0] > counts["bits", -1][3]
    assert counts["bits", 1][3] > counts["bits", 1][0]


def test_coupled_draws_payments_by_bytes_saved_per_importance(problem):
    """A rank step up from the edge of the budget is paid by one step down, of whichever knob."""
    start = Configuration.of([8, 8, 8, 8], [8, 16, 16, 16])
    tight = with_importance(toy_problem(4, limit=problem.bytes(start)), (1.0,) * 4, (0.0, 1.0, 1.0, 1.0))
    counts = edits(MemoryBalancedCoupled(gamma=0.5), tight, start)
    saved = Ledger(tight, start.replace(0, rank=16)).relief()[0]
    saved[0, 1] = 0.0  # locked
    weights = np.sqrt(saved / weights_of_layers(tight, DEFAULT_EPSILON))
    paid = np.stack([counts["bits", -1], counts["rank", -1]], axis=1)
    assert counts["rank", 1].sum() == DRAWS
    assert_frequencies(paid.ravel(), weights.ravel())


def test_coupled_leaves_room_unused_when_nothing_is_over(problem):
    roomy = toy_problem(4, like=(8, 16))
    rng = np.random.default_rng(0)
    start = roomy.space.uniform(4, 8)
    for _ in range(50):
        varied = MemoryBalancedCoupled().mutate(roomy, start, rng)
        assert (roomy.space.indices(varied) - roomy.space.indices(start)).sum() == 1


def test_coupled_returns_the_largest_configuration_as_it_is(problem):
    largest = problem.space.largest
    assert MemoryBalancedCoupled().mutate(problem, largest, np.random.default_rng(0)) == largest


@pytest.mark.parametrize("name", mutations.names())
def test_ten_thousand_layers_mutate_in_time_that_no_square_of_them_would_take(name):
    problem = toy_problem(10_000)
    operator, start = mutations.create(name), problem.space.uniform(4, 16)
    started = time.process_time()
    operator.mutate(problem, start, np.random.default_rng(0))
    assert time.process_time() - started < 20


@pytest.mark.parametrize("options", [{"gamma": 0.0}, {"epsilon": 0.0}, {"epsilon": -1.0}])
@pytest.mark.parametrize("name", ["sensitivity", "coupled"])
def test_senseless_options_are_refused(name, options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        mutations.create(name, **options)


def test_unknown_direction_is_refused():
    with pytest.raises(ConfigurationError, match="direction must be one of"):
        SensitivityGuided(direction="sideways")  # type: ignore[arg-type]


def test_draw_never_returns_an_index_of_weight_zero():
    rng = np.random.default_rng(0)
    weights = np.array([0.0, 1e-300, 0.0, 1e300, 0.0])
    assert {draw(weights, rng) for _ in range(200)} == {3}
    assert draw(np.zeros(3), rng) is None
    assert draw(np.zeros(0), rng) is None
