"""How fine a score of so many items is: its standard error, and the smallest difference that it can tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import sqrt
from typing import Final

import numpy as np
from numpy.typing import NDArray

CONFIDENT: Final = 1.959964
"""Standard errors to either side of a 95 % interval."""

CHANGED: Final = 0.1
"""Share of the items on which two configurations are taken to differ by a whole right answer, before any scoring."""

_MOST_PAIRS: Final = 200


@dataclass(frozen=True)
class TaskItems:
    """A task with its items and its weight in the score."""

    name: str
    items: int
    weight: float = 1.0


@dataclass(frozen=True)
class TaskError:
    """The standard error of a task's figure over so many items."""

    name: str
    items: int
    standard_error: float


@dataclass(frozen=True)
class Resolution:
    """How fine a score is at a rung of so many steps.

    `unpaired` and `paired` are the smallest differences between two configurations that are told from 0 at 95 %: over
    other items each, and over the same items, as a search compares them. `measured` says whether that comes of
    scorings; else figures between 0 and 1 are taken at their worst, a variance of 1/4, and pairs to differ by 1 on
    `CHANGED` of the items.
    """

    steps: int
    tasks: tuple[TaskError, ...]
    standard_error: float
    unpaired: float
    paired: float
    measured: bool


def foretold(steps: int, tasks: Sequence[TaskItems]) -> Resolution:
    """Resolution of a weighted mean of figures between 0 and 1, before any scoring: p (1 - p) / n is at most 1 / 4n."""
    errors = [sqrt(0.25 / task.items) for task in tasks]
    changes = [sqrt(CHANGED / task.items) for task in tasks]
    weights = [task.weight for task in tasks]
    error = _of_mean(errors, weights)
    return _made(steps, tasks, errors, error, CONFIDENT * _of_mean(changes, weights), measured=False)


def measured(steps: int, tasks: Sequence[TaskItems], outcomes: Sequence[Sequence[float]]) -> Resolution | None:
    """Resolution by the outcomes of evaluations at a rung, each of all items, task by task; None without any.

    Standard errors are the mean over the evaluations, paired ones over their pairs.
    """
    size = sum(task.items for task in tasks)
    rows = [np.asarray(own, dtype=np.float64) for own in outcomes if len(own) == size]
    if not rows:
        return None
    weights = [task.weight for task in tasks]
    errors = np.array([_errors(row, tasks) for row in rows])  # (evaluations, tasks)
    pairs = [a - b for a, b in list(combinations(rows, 2))[:_MOST_PAIRS]]
    changes = [_of_mean(_errors(pair, tasks), weights) for pair in pairs if np.any(pair)]
    mean = errors.mean(axis=0).tolist()
    error = float(np.mean([_of_mean(own, weights) for own in errors]))
    paired = CONFIDENT * float(np.mean(changes)) if changes else float("nan")
    return _made(steps, tasks, mean, error, paired, measured=True)


def _made(
    steps: int, tasks: Sequence[TaskItems], errors: Sequence[float], error: float, paired: float, *, measured: bool
) -> Resolution:
    told = tuple(TaskError(task.name, task.items, own) for task, own in zip(tasks, errors, strict=True))
    return Resolution(steps, told, error, CONFIDENT * sqrt(2) * error, paired, measured)


def _errors(values: NDArray[np.float64], tasks: Sequence[TaskItems]) -> list[float]:
    """Standard error of each task's mean; NaN where a task has one item."""
    ends = np.cumsum([task.items for task in tasks])[:-1]
    parts = np.split(values, ends)
    return [float(np.std(part, ddof=1)) / sqrt(part.size) if part.size > 1 else float("nan") for part in parts]


def _of_mean(errors: Sequence[float] | NDArray[np.float64], weights: Sequence[float]) -> float:
    """Standard error of the weighted mean of independent figures."""
    shares = np.asarray(weights, dtype=np.float64) / sum(weights)
    return float(np.sqrt(np.square(shares * np.asarray(errors)).sum()))
