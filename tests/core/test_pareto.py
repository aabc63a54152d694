from __future__ import annotations

import math

import moocore
import numpy as np
import pytest

from qratk.core import Configuration, Evaluation, Footprint, ParetoFront, hypervolume_2d


def evaluation(index: int, score: float, size: int) -> Evaluation:
    return Evaluation(Configuration.of([4], [index]), 10, score, Footprint(size, 0, 0, 0, size, size))


def random_evaluations(rng: np.random.Generator, count: int, levels: int) -> list[Evaluation]:
    """Evaluations on a coarse grid, so that ties and repeats occur."""
    scores, sizes = rng.integers(levels, size=count), 1 + rng.integers(levels, size=count)
    return [evaluation(i, float(s), int(b)) for i, (s, b) in enumerate(zip(scores, sizes, strict=True))]


@pytest.mark.parametrize("levels", [3, 8, 1000])
def test_hypervolume_agrees_with_moocore(levels):
    rng = np.random.default_rng(levels)
    for count in (1, 2, 5, 30):
        points = rng.integers(levels, size=(count, 2)).astype(float)
        reference = (0.8 * levels, 0.9 * levels)
        expected = moocore.hypervolume(points, ref=list(reference))
        assert hypervolume_2d(map(tuple, points), reference) == pytest.approx(expected)


def test_hypervolume_of_nothing_is_zero():
    assert hypervolume_2d([], (1.0, 1.0)) == 0.0
    assert hypervolume_2d([(1.0, 0.5), (0.5, 1.0), (2.0, 2.0)], (1.0, 1.0)) == 0.0


@pytest.mark.parametrize("levels", [3, 8, 1000])
def test_front_agrees_with_brute_force(levels):
    rng = np.random.default_rng(levels)
    for count in (1, 2, 7, 40):
        evaluations = random_evaluations(rng, count, levels)

        def dominates(a: Evaluation, b: Evaluation) -> bool:
            x, y = (-a.score, a.footprint.storage_bytes), (-b.score, b.footprint.storage_bytes)
            return x != y and x[0] <= y[0] and x[1] <= y[1]

        expected = {
            (b.score, b.footprint.storage_bytes) for b in evaluations if not any(dominates(a, b) for a in evaluations)
        }
        front = ParetoFront.of(evaluations)
        found = [(e.score, e.footprint.storage_bytes) for e in front.evaluations]
        assert set(found) == expected
        assert len(found) == len(expected)
        assert [size for _, size in found] == sorted(size for _, size in found)


def test_of_equal_evaluations_the_first_measured_stays_on_the_front():
    first, second = evaluation(1, 1.0, 10), evaluation(2, 1.0, 10)
    assert ParetoFront.of([first, second]).evaluations == (first,)


def test_failed_evaluations_are_not_on_the_front():
    failure = Evaluation(
        Configuration.of([2], [4]), 10, -math.inf, Footprint(1, 0, 0, 0, 1, 1), status="failed", reason="out of memory"
    )
    assert ParetoFront.of([failure, evaluation(1, 0.0, 10)]).evaluations == (evaluation(1, 0.0, 10),)


def test_front_hypervolume_measures_bytes_in_budgets():
    front = ParetoFront.of([evaluation(1, 2.0, 50), evaluation(2, 3.0, 100)])
    points = [(-2.0, 0.5), (-3.0, 1.0)]
    assert front.hypervolume((0.0, 1.1), 100) == pytest.approx(hypervolume_2d(points, (0.0, 1.1)))
