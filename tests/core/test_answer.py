from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from qratk.core import Configuration, Evaluation, Footprint, Utility
from qratk.core.answer import best, fitting, front
from qratk.testing import toy_problem

HIGH = 900
PROBLEM = toy_problem(3)


def evaluation(configuration: Configuration, score: float, steps: int = HIGH) -> Evaluation:
    return Evaluation(configuration, steps, score, PROBLEM.footprint(configuration))


def measured(seed: int, levels: int, count: int = 40) -> list[Evaluation]:
    """Distinct configurations, many over the budget, with scores on a coarse grid so that ties occur."""
    rng = np.random.default_rng(seed)
    configurations = dict.fromkeys(PROBLEM.space.random(rng) for _ in range(count))
    return [evaluation(c, float(rng.integers(levels))) for c in configurations]


@pytest.mark.parametrize("levels", [3, 1000])
@pytest.mark.parametrize("seed", range(5))
def test_best_agrees_with_a_search_through_all(levels, seed):
    everything = measured(seed, levels)
    able = [e for e in everything if PROBLEM.bytes(e.configuration) <= PROBLEM.budget.limit_bytes]
    top = max(e.score for e in able)
    smallest = min(PROBLEM.bytes(e.configuration) for e in able if e.score == top)
    found = best(PROBLEM, everything, HIGH)
    assert (found.score, PROBLEM.bytes(found.configuration)) == (top, smallest)


def test_what_fails_or_is_of_another_rung_or_over_the_budget_is_no_answer():
    small, large = PROBLEM.space.smallest, PROBLEM.space.largest
    failed = dataclasses.replace(evaluation(small, 0.0), score=float("-inf"), status="failed", reason="because")
    others = [failed, evaluation(small, 9.0, steps=100), evaluation(large, 9.0)]
    assert fitting(PROBLEM, others, HIGH) == []
    assert best(PROBLEM, others, HIGH) is None
    assert len(front(PROBLEM, others, HIGH)) == 0


def test_no_utility_makes_the_answer_worse_than_a_baseline():
    baseline = evaluation(PROBLEM.space.uniform(4, 8), 1.0)
    smaller = evaluation(PROBLEM.space.smallest, 0.9)
    asked = {"utility": 0.0}
    assert best(PROBLEM, [smaller, baseline], HIGH, **asked) == smaller
    assert best(PROBLEM, [smaller, baseline], HIGH, baselines=[baseline.configuration], **asked) == baseline


def test_a_baseline_over_the_budget_sets_no_floor():
    over, small = evaluation(PROBLEM.space.largest, 5.0), evaluation(PROBLEM.space.smallest, 1.0)
    assert best(PROBLEM, [over, small], HIGH, baselines=[over.configuration]) == small


def test_a_number_stands_for_the_utility_with_that_alpha():
    everything = measured(0, 1000)
    ranges = Utility.over(fitting(PROBLEM, everything, HIGH), alpha=0.3)
    assert best(PROBLEM, everything, HIGH, utility=0.3) == best(PROBLEM, everything, HIGH, utility=ranges)


@pytest.mark.parametrize("over", [0, 1])
def test_what_lies_off_the_ladders_fits_by_its_measured_bytes(over):
    size = PROBLEM.budget.limit_bytes + over
    reference = Evaluation(Configuration.uniform(16, 16, 3), HIGH, 1.0, Footprint(size, 0, 0, 0, size, size))
    assert PROBLEM.fits(reference) == (over == 0)


def test_the_cap_on_average_bits_holds_off_the_ladders_too():
    capped = toy_problem(3, max_average_bits=4.0)
    footprint = Footprint(1, 0, 0, 0, 1, 1)
    assert capped.fits(Evaluation(Configuration.uniform(4, 16, 3), HIGH, 1.0, footprint))
    assert not capped.fits(Evaluation(Configuration.uniform(5, 16, 3), HIGH, 1.0, footprint))
