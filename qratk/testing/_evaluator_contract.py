"""The contract suite of evaluators that can be opened without a model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qratk.core.errors import ConfigurationError
from qratk.core.evaluation import Candidate, Evaluation, FidelityLadder, Request
from qratk.core.shared import SharedLadder
from qratk.core.space import SearchSpace
from qratk.estimators.base import estimators
from qratk.evaluators.base import EvaluationContext, Evaluator

LADDER = FidelityLadder((10, 20))


class EvaluatorContract:
    """What every evaluator promises. `make` builds one that needs no model, or brings its own."""

    @pytest.fixture
    def make(self) -> Callable[[], Evaluator]:
        """A callable that builds the evaluator under test."""
        raise NotImplementedError(f"{type(self).__name__} must override the fixture 'make'")

    @pytest.fixture
    def opened(self, make: Callable[[], Evaluator], tmp_path: Path) -> Callable[[], Evaluator]:
        """A callable that builds and opens one."""

        def begin() -> Evaluator:
            evaluator = make()
            evaluator.open(EvaluationContext(tmp_path, LADDER, 0))
            return evaluator

        return begin

    def test_results_are_those_of_the_requests_in_their_order(self, opened: Callable[[], Evaluator]) -> None:
        evaluator = opened()
        requests = some_requests(evaluator)
        found = list(evaluator.evaluate(requests))
        assert [(e.configuration, e.steps) for e in found] == [(r.configuration, r.steps) for r in requests]
        assert all(math.isfinite(e.score) if e.ok else e.reason for e in found)

    def test_a_result_does_not_depend_on_what_was_measured_before(self, opened: Callable[[], Evaluator]) -> None:
        first, again = opened(), opened()
        requests = [r for r in some_requests(first) if r.steps == LADDER.steps[0]]
        forth, back = list(first.evaluate(requests)), list(again.evaluate(requests[::-1]))[::-1]
        assert [told(e) for e in forth] == [told(e) for e in back]

    def test_groups_are_the_requests_in_order(self, opened: Callable[[], Evaluator]) -> None:
        evaluator = opened()
        requests = some_requests(evaluator)
        assert [request for group in evaluator.groups(requests) for request in group] == requests
        assert not any(evaluator.groups([]))

    def test_footprint_is_that_of_the_memory_model(self, opened: Callable[[], Evaluator]) -> None:
        evaluator = opened()
        memory = evaluator.memory_model(space_of(evaluator))
        for evaluation in evaluator.evaluate(some_requests(evaluator)):
            assert evaluation.footprint == memory.footprint(evaluation.configuration)

    def test_shared_settings_are_refused_in_words_or_decide_the_score(self, opened: Callable[[], Evaluator]) -> None:
        evaluator = opened()
        with pytest.raises(ConfigurationError):
            evaluator.check_shared(SharedLadder("no_such_option", (1, 2)))
        rates = SharedLadder("learning_rate", (1e-4, 1e-1))
        try:
            evaluator.check_shared(rates)
        except ConfigurationError:
            return
        space = replace(space_of(evaluator), shared=(rates,))
        memory = evaluator.memory_model(space)
        configurations = [space.uniform(4, 4).with_shared(shared) for shared in space.all_shared]
        asked = [Request(Candidate(c, "uniform", phase="baseline"), LADDER.highest) for c in configurations]
        found = [evaluation for group in evaluator.groups(asked) for evaluation in evaluator.evaluate(group)]
        assert [e.configuration for e in found] == configurations
        assert found[0].score != found[1].score
        assert found[0].footprint == found[1].footprint == memory.footprint(configurations[0])

    def test_replicates_are_told_or_not_promised(self, opened: Callable[[], Evaluator]) -> None:
        evaluator = opened()
        if not evaluator.replicates:
            return
        sound = next(e for e in evaluator.evaluate(some_requests(evaluator)) if e.ok and e.steps == LADDER.highest)
        candidate = Candidate(sound.configuration, "uniform", phase="confirmation")
        asked = [Request(candidate, LADDER.highest, number) for number in (1, 2)]
        found = [evaluation for group in evaluator.groups(asked) for evaluation in evaluator.evaluate(group)]
        assert [e.replicate for e in (sound, *found)] == [0, 1, 2]
        assert len({e.score for e in (sound, *found)}) == 3  # a fresh seed each
        assert {e.footprint for e in found} == {sound.footprint}
        again = opened()
        for request, expected in zip(asked[::-1], found[::-1], strict=True):
            assert told(again.evaluate([request])[0]) == told(expected)

    def test_importance_is_one_a_layer_finite_and_not_negative(self, opened: Callable[[], Evaluator]) -> None:
        evaluator = opened()
        scores = evaluator.importance(estimators.create("uniform"), space_of(evaluator))
        assert scores.shape == (len(evaluator.shapes),)
        assert np.isfinite(scores).all()
        assert (scores >= 0).all()

    def test_what_rungs_mean_is_nothing_or_one_a_layer_and_rung(self, opened: Callable[[], Evaluator]) -> None:
        evaluator = opened()
        space = space_of(evaluator)
        assert evaluator.importance_by_rung(estimators.create("uniform"), space, "bits") is None
        gains = evaluator.importance_by_rung(estimators.create("explained_variance"), space, "rank")
        assert gains is None or gains.shape == (space.num_layers, len(space.ranks))

    def test_weights_are_one_an_item(self, opened: Callable[[], Evaluator]) -> None:
        evaluator = opened()
        evaluation = next(e for e in evaluator.evaluate(some_requests(evaluator)) if e.ok)
        assert evaluator.item_weights is None or len(evaluator.item_weights) == len(evaluation.outcomes)

    def test_test_scores_have_names(self, opened: Callable[[], Evaluator]) -> None:
        evaluator = opened()
        evaluation = next(e for e in evaluator.evaluate(some_requests(evaluator)) if e.ok)
        if evaluator.prepare_test():
            assert evaluator.test(evaluation)
        evaluator.discard(evaluation)

    def test_fingerprint_is_the_same_of_the_same_options(self, opened: Callable[[], Evaluator]) -> None:
        assert opened().fingerprint() == opened().fingerprint()


def space_of(evaluator: Evaluator) -> SearchSpace:
    """Two bit-widths and two ranks over the evaluator's layers."""
    return SearchSpace((2, 4), (2, 4), tuple(shape.name for shape in evaluator.shapes))


def some_requests(evaluator: Evaluator) -> list[Request]:
    """Every uniform configuration at both rungs, the lower one first."""
    uniforms = space_of(evaluator).uniforms()
    return [Request(Candidate(c, "uniform", phase="baseline"), steps) for steps in LADDER.steps for c in uniforms]


def told(evaluation: Evaluation) -> tuple[object, ...]:
    """What is the same of an evaluation however long it took and wherever its checkpoint lies."""
    return evaluation.configuration, evaluation.score, evaluation.outcomes, evaluation.status
