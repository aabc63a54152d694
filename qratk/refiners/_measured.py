"""What a refiner reads of the history: who is a centre, who informs a model."""

from __future__ import annotations

from qratk.core.configuration import Configuration
from qratk.core.evaluation import History
from qratk.core.problem import Problem
from qratk.core.utility import Utility


def ranked(problem: Problem, utility: Utility, history: History, steps: int) -> list[Configuration]:
    """Feasible configurations of the space measured at a number of steps: best first, ties by footprint."""
    measured = [e for e in history.at(steps) if e.configuration in problem.space]
    feasible = [e for e in measured if problem.feasible(e.configuration)]
    feasible.sort(key=lambda e: (-utility.of(e), problem.bytes(e.configuration), e.configuration))
    return [e.configuration for e in feasible]


def utility_of(utility: Utility, history: History, configuration: Configuration, steps: int) -> float:
    """Utility of a configuration that was measured at a number of steps."""
    evaluation = history.get(configuration, steps)
    assert evaluation is not None
    return utility.of(evaluation)


def utilities(problem: Problem, utility: Utility, history: History, steps: int) -> list[tuple[Configuration, float]]:
    """Utilities of all configurations on the ladders at a number of steps; a failure counts as the worst one."""
    found = [e for e in history if e.steps == steps and e.configuration in problem.space]
    worst = min(utility.of(e) for e in found if e.ok)
    return [(e.configuration, utility.of(e) if e.ok else worst) for e in found]
