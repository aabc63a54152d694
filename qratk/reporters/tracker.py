"""What reporters know of a running search: its plan, its records, and the best and the front of them so far."""

from __future__ import annotations

from qratk.core import answer
from qratk.core.evaluation import Evaluation
from qratk.core.pareto import ParetoFront
from qratk.core.problem import Problem
from qratk.core.result import Progress, Record, SearchPlan


def budget_bytes(problem: Problem, evaluation: Evaluation) -> int:
    """Bytes of an evaluation in the budget's scope."""
    return evaluation.footprint.bytes(problem.budget.scope)


class Tracker:
    """Running state of one search, fed by a reporter's own calls.

    `best` is what the loop said last; None before it said any. References and replicates with fresh seeds never count,
    since they answer other questions.
    """

    def __init__(self, plan: SearchPlan) -> None:
        self.plan = plan
        self.records: list[Record] = []
        self.measured: list[Evaluation] = []
        self.best: Evaluation | None = None

    def add(self, record: Record, progress: Progress | None = None) -> None:
        """Take in a record; `measured` keeps those at the highest rung."""
        self.records.append(record)
        evaluation = record.evaluation
        if evaluation.ok and evaluation.steps == self.plan.ladder.highest and record.searched:
            self.measured.append(evaluation)
        if progress is not None:
            self.hear(progress.best)

    def hear(self, best: Evaluation | None) -> None:
        """Take the loop's word for which evaluation is the best."""
        if best is not None:
            self.best = best

    @property
    def replaying(self) -> bool:
        """Whether the records so far are those of an earlier run, with more of them to come."""
        return len(self.records) < self.plan.resumed

    @property
    def baselines(self) -> list[Evaluation]:
        """The uniform configurations that fit, measured at the highest rung."""
        uniforms = [e for e in self.measured if e.configuration in self.plan.baselines]
        return answer.fitting(self.plan.problem, uniforms, self.plan.ladder.highest)

    @property
    def best_baseline(self) -> Evaluation | None:
        """The best uniform configuration so far that fits."""
        return answer.best(self.plan.problem, self.baselines, self.plan.ladder.highest)

    @property
    def front(self) -> ParetoFront:
        """Front of what was measured at the highest rung and fits."""
        return answer.front(self.plan.problem, self.measured, self.plan.ladder.highest)
