from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest
from searcher_toys import ask_once, failure, gain

from qratk.core import Configuration, Evaluation, History, Problem
from qratk.core.errors import ConfigurationError
from qratk.searchers._kernel_density import LadderDensity, importance_bandwidths, ordinal_kernels
from qratk.searchers.base import searchers
from qratk.testing import toy_problem


def feasible(problem: Problem, count: int, seed: int = 0) -> list[Configuration]:
    rng, found = np.random.default_rng(seed), {}
    while len(found) < count:
        drawn = problem.space.random(rng)
        if problem.feasible(drawn):
            found[drawn] = None
    return list(found)


ask = partial(ask_once, "bohb", offspring=20)


def test_kernels_fall_by_the_bandwidth_a_rung_and_sum_to_one():
    kernels = ordinal_kernels(5, np.array([0.1, 0.7]))
    np.testing.assert_allclose(kernels.sum(axis=2), 1.0)
    for layer, bandwidth in enumerate((0.1, 0.7)):
        for seen, rung in itertools.product(range(5), range(5)):
            expected = kernels[layer, seen, seen] * bandwidth ** abs(seen - rung)
            assert kernels[layer, seen, rung] == pytest.approx(expected)


def test_density_is_the_product_of_the_knobs_kernel_means():
    problem = toy_problem(2)
    points, bandwidths = feasible(problem, 4), (np.array([0.2, 0.5]), np.array([0.3, 0.1]))
    density = LadderDensity.of(problem, points, bandwidths)
    total = 0.0
    for flat in itertools.product(range(3), repeat=4):
        indices = np.array(flat).reshape(2, 2)
        expected = 1.0
        for layer, column in itertools.product(range(2), range(2)):
            weights = bandwidths[column][layer] ** np.abs(np.subtract.outer(np.arange(3), np.arange(3)))
            seen = [problem.space.indices(c)[layer, column] for c in points]
            kernels = [weights[s, indices[layer, column]] / weights[s].sum() for s in seen]
            expected *= (sum(kernels) + 1 / 3) / 5
        found = float(np.exp(density.log_density(indices[None], np.zeros((1, 0), dtype=np.int64))[0]))
        assert found == pytest.approx(expected)
        total += found
    assert total == pytest.approx(1.0)


def test_samples_come_with_the_densitys_frequencies():
    problem = toy_problem(3)
    density = LadderDensity.of(problem, feasible(problem, 5), (np.full(3, 0.3), np.full(3, 0.2)))
    drawn, _ = density.sample(20_000, np.random.default_rng(0))
    for column, table in enumerate(density.tables):
        found = np.stack([(drawn[:, :, column] == rung).mean(axis=0) for rung in range(3)], axis=1)
        np.testing.assert_allclose(found, table, atol=0.015)


def test_bandwidth_shrinks_with_importance():
    problem = toy_problem(8)
    for knob, bandwidths in zip(("bits", "rank"), importance_bandwidths(problem, 0.1, 0.4), strict=True):
        order = np.argsort(problem.normalised_importance[knob])
        assert bandwidths[order[0]] == pytest.approx(0.4)
        assert bandwidths[order[-1]] == pytest.approx(0.1)
        assert (np.diff(bandwidths[order]) <= 0).all()


def scored(problem: Problem, steps: int, score) -> list[Evaluation]:
    return [Evaluation(c, steps, score(c), problem.footprint(c)) for c in feasible(problem, 40)]


def share_of_high_ranks(candidates, layer: int) -> float:
    return float(np.mean([c.configuration.ranks[layer] == 16 for c in candidates if c.origin == "bohb"]))


def test_proposals_imitate_what_is_good():
    problem = toy_problem(8, like=(8, 16))
    history = History(scored(problem, 900, lambda c: c.ranks[0] - c.ranks[1]))
    candidates = ask(problem, history, random_fraction=0.0)
    assert {c.origin for c in candidates} == {"bohb"}
    assert share_of_high_ranks(candidates, 0) > 0.8
    assert share_of_high_ranks(candidates, 1) < 0.2


def test_model_is_that_of_the_highest_rung_with_enough_points():
    problem = toy_problem(8, like=(8, 16))
    low = scored(problem, 100, lambda c: c.ranks[0])
    high = scored(problem, 900, lambda c: -c.ranks[0])
    few, enough = History([*low, *high[:7]]), History([*low, *high])
    assert share_of_high_ranks(ask(problem, few, random_fraction=0.0), 0) > 0.8
    assert share_of_high_ranks(ask(problem, enough, random_fraction=0.0), 0) < 0.2


def test_failures_count_as_bad():
    problem = toy_problem(8, like=(8, 16))
    evaluations = [
        failure(problem, e.configuration) if e.configuration.ranks[0] == 16 else e
        for e in scored(problem, 900, lambda c: 1.0)
    ]
    assert share_of_high_ranks(ask(problem, History(evaluations), random_fraction=0.0), 0) < 0.2


def test_too_few_points_mean_random_candidates():
    problem = toy_problem(8)
    history = History(scored(problem, 900, lambda c: c.ranks[0])[:7])
    assert {c.origin for c in ask(problem, history)} == {"random"}


def test_a_third_is_random_by_default():
    problem = toy_problem(8, like=(8, 16))
    history = History(scored(problem, 900, lambda c: c.ranks[0]))
    origins = [c.origin for seed in range(10) for c in ask(problem, history, seed=seed)]
    assert origins.count("random") / len(origins) == pytest.approx(1 / 3, abs=0.1)


def test_model_beats_random_proposals():
    assert min(gain("bohb", seed, over="hyperband") for seed in range(3)) > 0


@pytest.mark.parametrize(
    "options",
    [{"random_fraction": 1.1}, {"good_fraction": 0.0}, {"min_points": 0}, {"samples": 0}, {"narrow": 0.5}, {"wide": 1}],
)
def test_senseless_options_are_refused(options):
    with pytest.raises(ConfigurationError):
        searchers.create("bohb", **options)
