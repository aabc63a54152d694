"""The contract suite of executors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import final

import pytest

from qratk.core.errors import SearchError
from qratk.core.evaluation import Candidate, Evaluation, FidelityLadder, Request
from qratk.core.space import SearchSpace
from qratk.evaluators.base import EvaluationContext, Evaluator
from qratk.evaluators.on_landscape import LandscapeEvaluator
from qratk.executors.base import Executor, Group
from qratk.testing.toy import ToyEvaluator, toy_problem

LADDER = FidelityLadder((100, 300, 900))


@final
class Raising(LandscapeEvaluator):
    """Raises at the smallest configuration."""

    def evaluate(self, group: Sequence[Request]) -> Sequence[Evaluation]:
        """Evaluations of a group without the smallest configuration."""
        if any(set(request.configuration.bits) == {2} for request in group):
            raise SearchError("the smallest cannot be measured")
        return [self.measure(request.configuration, request.steps) for request in group]

    def discard(self, evaluation: Evaluation) -> None:
        """Nothing is stored."""


class ExecutorContract:
    """What every executor promises. `make` builds the executor; evaluators of the suite need no model."""

    @pytest.fixture
    def make(self) -> Callable[[], Executor]:
        """A callable that builds the executor under test."""
        raise NotImplementedError(f"{type(self).__name__} must override the fixture 'make'")

    @pytest.fixture
    def begun(self, make: Callable[[], Executor], tmp_path: Path) -> Iterator[Callable[[Evaluator], Executor]]:
        """A callable that opens an executor on an evaluator; what it opens is closed in the end."""
        opened: list[Executor] = []

        def begin(evaluator: Evaluator) -> Executor:
            executor = make()
            opened.append(executor)
            executor.open(evaluator, EvaluationContext(tmp_path, LADDER, 0), None)
            names = tuple(shape.name for shape in evaluator.shapes)
            executor.begin(SearchSpace((2, 4, 8), (4, 8, 16), names))
            return executor

        yield begin
        for executor in opened:
            executor.close()

    def test_every_group_comes_back_once_with_what_the_evaluator_says_of_it(
        self, begun: Callable[[Evaluator], Executor]
    ) -> None:
        executor, groups = begun(ToyEvaluator(num_layers=3, failures=0.3)), some_groups()
        alone = ToyEvaluator(num_layers=3, failures=0.3)
        found = list(executor.finished(groups))
        assert sorted(map(positions(groups), (group for group, _ in found))) == list(range(len(groups)))
        for group, evaluations in found:
            assert list(evaluations) == list(alone.evaluate(group))

    def test_a_group_is_taken_when_it_can_begin_and_no_earlier(self, begun: Callable[[Evaluator], Executor]) -> None:
        executor, taken = begun(ToyEvaluator(num_layers=3)), list[Group]()

        def groups() -> Iterator[Group]:
            for group in some_groups():
                taken.append(group)
                yield group

        for ended, _ in enumerate(executor.finished(groups())):
            assert len(taken) <= ended + 2 * executor.workers

    def test_references_off_the_ladders_are_measured(self, begun: Callable[[Evaluator], Executor]) -> None:
        space = toy_problem(3, bits=(2, 16)).space
        request = Request(Candidate(space.uniform(16, 8), "reference", phase="reference"), 900)
        ((group, evaluations),) = begun(ToyEvaluator(num_layers=3)).finished([[request]])
        assert list(group) == [request]
        assert list(evaluations) == list(ToyEvaluator(num_layers=3).evaluate([request]))

    def test_what_an_evaluator_raises_is_raised(self, begun: Callable[[Evaluator], Executor]) -> None:
        executor = begun(Raising(num_layers=3))
        with pytest.raises(SearchError, match="the smallest cannot be measured"):
            list(executor.finished(some_groups()))
        executor.close()

    def test_test_scores_are_those_of_the_evaluator(self, begun: Callable[[Evaluator], Executor]) -> None:
        alone = ToyEvaluator(num_layers=3)
        evaluations = [e for group in some_groups() for e in alone.evaluate(group)]
        found = {(e.configuration, e.steps): s for e, s in begun(ToyEvaluator(num_layers=3)).tested(evaluations)}
        assert found == {(e.configuration, e.steps): alone.test(e) for e in evaluations}

    def test_nothing_asked_for_gives_nothing(self, begun: Callable[[Evaluator], Executor]) -> None:
        executor = begun(ToyEvaluator(num_layers=3))
        assert list(executor.finished([])) == []
        assert list(executor.tested([])) == []

    def test_it_may_be_given_up_halfway_and_used_again(self, begun: Callable[[Evaluator], Executor]) -> None:
        executor, groups = begun(ToyEvaluator(num_layers=3)), some_groups()
        halfway = iter(executor.finished(groups))
        next(halfway)
        getattr(halfway, "close", lambda: None)()
        assert len(list(executor.finished(groups))) == len(groups)


def some_groups() -> list[list[Request]]:
    """Groups of one and two uniform configurations, the smallest last."""
    uniforms = toy_problem(3).space.uniforms()[::-1]
    requests = [Request(Candidate(c, "uniform", phase="baseline"), 100) for c in uniforms]
    return [requests[:2], requests[2:3], requests[3:5], requests[5:7], requests[7:]]


def positions(groups: Sequence[Group]) -> Callable[[Group], int]:
    """A callable that finds a group among others."""
    return lambda group: next(n for n, other in enumerate(groups) if list(other) == list(group))
