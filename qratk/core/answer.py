"""What a search answers with: of what was measured, what fits, the front of that, and the best."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

from qratk.core.configuration import Configuration
from qratk.core.evaluation import Evaluation
from qratk.core.pareto import ParetoFront
from qratk.core.problem import Problem
from qratk.core.utility import Utility


def fitting(problem: Problem, measured: Iterable[Evaluation], steps: int) -> list[Evaluation]:
    """The successful evaluations at a number of steps that fit the budget, in the order given."""
    return [e for e in measured if e.steps == steps and e.ok and problem.fits(e)]


def front(problem: Problem, measured: Iterable[Evaluation], steps: int) -> ParetoFront:
    """Front of score and bytes, in the budget's scope, of what fits at a number of steps."""
    return ParetoFront.of(fitting(problem, measured, steps), problem.budget.scope)


def ranked(
    problem: Problem, measured: Iterable[Evaluation], steps: int, *, utility: Utility | float = 1.0
) -> list[Evaluation]:
    """What fits at a number of steps, the largest utility first; ties go to fewer bytes.

    `utility` as a number is its alpha; the ranges are then those of what fits (Eq. 4).
    """
    able, scope = fitting(problem, measured, steps), problem.budget.scope
    if not able:
        return []
    worth = utility if isinstance(utility, Utility) else Utility.over(able, alpha=utility, scope=scope)
    return sorted(able, key=lambda e: (-worth.of(e), e.footprint.bytes(scope), e.configuration))


def best(
    problem: Problem,
    measured: Iterable[Evaluation],
    steps: int,
    *,
    baselines: Collection[Configuration] = (),
    utility: Utility | float = 1.0,
) -> Evaluation | None:
    """Largest utility among what fits and scores no worse than the best baseline that fits; None when nothing does.

    Ties go to fewer bytes. `utility` is as for `ranked`.
    """
    able = ranked(problem, measured, steps, utility=utility)
    floor = max((e.score for e in able if e.configuration in baselines), default=-math.inf)
    return next((e for e in able if e.score >= floor), None)
