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


def best(
    problem: Problem,
    measured: Iterable[Evaluation],
    steps: int,
    *,
    baselines: Collection[Configuration] = (),
    utility: Utility | float = 1.0,
) -> Evaluation | None:
    """Largest utility among what fits and scores no worse than the best baseline that fits; None when nothing does.

    Ties go to fewer bytes. `utility` as a number is its alpha; the ranges are then those of what fits (Eq. 4).
    """
    able = fitting(problem, measured, steps)
    if not able:
        return None
    if not isinstance(utility, Utility):
        utility = Utility.over(able, alpha=utility, scope=problem.budget.scope)
    floor = max((e.score for e in able if e.configuration in baselines), default=-math.inf)
    worth, scope = utility, problem.budget.scope
    return min(
        (e for e in able if e.score >= floor),
        key=lambda e: (-worth.of(e), e.footprint.bytes(scope), e.configuration),
    )
