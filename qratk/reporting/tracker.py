"""What reporters know of a running search: its plan, its records, and the best and the front of them so far."""

from __future__ import annotations

from qratk.core.evaluation import Candidate, Evaluation
from qratk.core.pareto import ParetoFront
from qratk.core.problem import Problem
from qratk.core.result import Progress, Record, SearchPlan


def budget_bytes(problem: Problem, evaluation: Evaluation) -> int:
    """Bytes of an evaluation in the budget's scope."""
    return evaluation.footprint.bytes(problem.budget.scope)


def fits(problem: Problem, evaluation: Evaluation) -> bool:
    """Whether a measured configuration fits the budget, also one off the ladders (a reference in 16 bits)."""
    cap = problem.budget.max_average_bits
    if budget_bytes(problem, evaluation) > problem.budget.limit_bytes:
        return False
    return cap is None or problem.memory.average_bits(evaluation.configuration) <= cap * (1 + 1e-12)


def _order(evaluation: Evaluation) -> tuple[float, int, object]:
    return (-evaluation.score, evaluation.footprint.storage_bytes, evaluation.configuration)


class Tracker:
    """Running state of one search, fed by a reporter's own calls.

    `best` is what the loop said last, or else the best that was measured at the highest rung within the budget;
    candidates of the phase "reference" never count, since they answer other questions.
    """

    def __init__(self, plan: SearchPlan) -> None:
        self.plan = plan
        self.records: list[Record] = []
        self.measured: list[Evaluation] = []
        self.baselines: list[Evaluation] = []
        self._best: Evaluation | None = None
        self._said: Evaluation | None = None
        self._baseline_set = set(plan.baselines)

    def add(self, record: Record, progress: Progress | None = None) -> None:
        """Take in a record; `measured` and `baselines` keep those at the highest rung."""
        self.records.append(record)
        evaluation = record.evaluation
        if evaluation.ok and evaluation.steps == self.plan.ladder.highest:
            self._add_measured(record.candidate, evaluation)
        if progress is not None:
            self.hear(progress.best)

    def _add_measured(self, candidate: Candidate, evaluation: Evaluation) -> None:
        if candidate.phase == "reference":
            return
        self.measured.append(evaluation)
        if not fits(self.plan.problem, evaluation):
            return
        if evaluation.configuration in self._baseline_set:
            self.baselines.append(evaluation)
        if self._best is None or _order(evaluation) < _order(self._best):
            self._best = evaluation

    def hear(self, best: Evaluation | None) -> None:
        """Take the loop's word for which evaluation is the best."""
        if best is not None and best.ok and best.steps == self.plan.ladder.highest:
            self._said = best

    @property
    def replaying(self) -> bool:
        """Whether the records so far are those of an earlier run, with more of them to come."""
        return len(self.records) < self.plan.resumed

    @property
    def best(self) -> Evaluation | None:
        """The best so far; None before anything was measured at the highest rung."""
        return self._said or self._best

    @property
    def best_baseline(self) -> Evaluation | None:
        """The best uniform configuration so far that fits."""
        return min(self.baselines, key=_order, default=None)

    @property
    def front(self) -> ParetoFront:
        """Front of what was measured at the highest rung and fits."""
        problem = self.plan.problem
        return ParetoFront.of([e for e in self.measured if fits(problem, e)], problem.budget.scope)
