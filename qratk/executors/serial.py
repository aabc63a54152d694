"""Executor that measures one group after another, in this process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from qratk.core.evaluation import Evaluation
from qratk.core.space import SearchSpace
from qratk.evaluators.base import EvaluationContext, Evaluator
from qratk.executors.base import Blueprint, Executor, Group, executors


@executors.register("serial")
class Serial(Executor):
    """Measures one group after another where the search itself runs."""

    def __init__(self) -> None:
        self._evaluator: Evaluator | None = None

    @property
    def workers(self) -> int:
        """One: groups are measured one after the other."""
        return 1

    def open(self, evaluator: Evaluator, context: EvaluationContext, blueprint: Blueprint | None) -> None:
        """Open the evaluator; no blueprint is needed."""
        evaluator.open(context)
        self._evaluator = evaluator

    def begin(self, space: SearchSpace) -> None:
        """Nothing: the evaluator knows the space."""

    def finished(self, groups: Iterable[Group]) -> Iterator[tuple[Group, Sequence[Evaluation]]]:
        """Each group with its evaluations, in the order of the groups."""
        for group in groups:
            yield group, self._opened.evaluate(group)

    def tested(self, evaluations: Iterable[Evaluation]) -> Iterator[tuple[Evaluation, dict[str, float]]]:
        """Each evaluation with its scores on test data, in the order given."""
        for evaluation in evaluations:
            yield evaluation, self._opened.test(evaluation)

    def close(self) -> None:
        """Nothing was begun."""

    @property
    def _opened(self) -> Evaluator:
        assert self._evaluator is not None, "open comes first"
        return self._evaluator
