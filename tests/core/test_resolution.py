from __future__ import annotations

import math

import numpy as np
import pytest

from qratk.core.resolution import TaskItems, foretold, measured

TASKS = (TaskItems("many", 400), TaskItems("few", 25, 2.0))


def test_before_any_scoring_figures_are_at_their_worst() -> None:
    found = foretold(10, TASKS)
    assert [task.standard_error for task in found.tasks] == pytest.approx([0.025, 0.1])
    assert found.standard_error == pytest.approx(math.hypot(0.025 / 3, 0.2 / 3))
    assert found.unpaired == pytest.approx(1.959964 * math.sqrt(2) * found.standard_error)
    changes = math.hypot(math.sqrt(0.1 / 400) / 3, 2 * math.sqrt(0.1 / 25) / 3)
    assert found.paired == pytest.approx(1.959964 * changes)
    assert not found.measured


def test_differences_that_are_told_are_told_as_often_as_promised() -> None:
    # Two configurations whose true scores differ by what is told: half of the intervals exclude 0.
    rng = np.random.default_rng(0)
    tasks = (TaskItems("one", 100), TaskItems("other", 50))
    shared = rng.normal(0.5, 0.2, 150)

    def outcomes(gain: float) -> np.ndarray:
        return shared + gain + rng.normal(0, 0.1, 150)

    found = measured(10, tasks, [outcomes(0.0).tolist() for _ in range(30)])
    assert found is not None
    assert found.measured
    assert found.paired == pytest.approx(1.96 * 0.1 * math.sqrt(2) * math.sqrt(1 / 400 + 1 / 200), rel=0.05)
    assert found.unpaired > 1.5 * found.paired
    told = 0
    for _ in range(400):
        change = outcomes(found.paired) - outcomes(0.0)
        told += bool((change[:100].mean() + change[100:].mean()) / 2 > found.paired)
    assert told == pytest.approx(200, abs=40)


def test_only_scorings_of_all_items_count() -> None:
    assert measured(10, TASKS, [[0.5] * 400]) is None
    found = measured(10, TASKS, [[0.0, 1.0] * 212 + [0.5], [1.0] * 3])
    assert found is not None
    assert math.isnan(found.paired)  # of one evaluation there is no pair
