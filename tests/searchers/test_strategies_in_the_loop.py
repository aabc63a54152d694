"""Searchers within the loop: what was planned bounds what is measured, and a resumed search is the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from qratk.components import REGISTRIES
from qratk.core import Evaluation, Request
from qratk.loop import SearchLoop
from qratk.testing import ToyEvaluator


class Interrupted(ToyEvaluator):
    """Is killed before its n-th evaluation."""

    def __init__(self, limit: int) -> None:
        super().__init__(6)
        self.limit = limit

    def evaluate(self, group: Sequence[Request]) -> Sequence[Evaluation]:
        found = super().evaluate(group)
        if len(self.calls) > self.limit:
            raise KeyboardInterrupt
        return found


def settings(evaluator: ToyEvaluator, searcher: str) -> SearchLoop:
    make = {kind: registry.create for kind, registry in REGISTRIES.items()}
    return SearchLoop(
        evaluator=evaluator,
        searcher=make["searchers"](searcher, offspring=9),
        refiner=make["refiners"]("hill_climb", max_evaluations=4),
        surrogate=make["surrogates"]("huber"),
        mutations=[make["mutations"]("sensitivity"), make["mutations"]("coupled")],
        repair=make["repairs"]("greedy"),
        bits_importance=make["estimators"]("fisher_residual"),
        rank_importance=make["estimators"]("gradient_spectrum"),
        like=(4, 8),
        generations=4,
        hypervolume_tolerance=-1.0,
        high_fidelity_candidates=2,
    )


def run(folder: Path, loop: SearchLoop):
    return loop.run(run_dir=folder, reporter=Silent(), config={"seed": 0})


class Silent:
    """A reporter that says nothing."""

    def __getattr__(self, name: str):
        return lambda *args: None


def measured(result) -> list[tuple[str, int, float, str]]:
    found = [(record.evaluation, record.candidate.origin) for record in result.records]
    return [(str(e.configuration), e.steps, e.score, origin) for e, origin in found]


@pytest.mark.parametrize("searcher", ["ageing_evolution", "decoupled", "hyperband", "bohb"])
def test_no_more_is_measured_than_planned_and_a_resumed_search_is_the_same(tmp_path: Path, searcher: str) -> None:
    whole = run(tmp_path / "whole", settings(ToyEvaluator(6), searcher))
    counts = Counter(record.evaluation.steps for record in whole.records)
    assert all(counts[steps] <= planned for steps, planned in whole.plan.evaluations.items())
    for limit in (8, 20, len(whole.records) - 2):
        folder = tmp_path / f"cut-{limit}"
        with pytest.raises(KeyboardInterrupt):
            run(folder, settings(Interrupted(limit), searcher))
        assert measured(run(folder, settings(ToyEvaluator(6), searcher))) == measured(whole)


@pytest.mark.parametrize("searcher", ["hyperband", "bohb"])
def test_brackets_begin_at_their_own_rungs_in_the_loop(tmp_path: Path, searcher: str) -> None:
    result = run(tmp_path, settings(ToyEvaluator(6), searcher))
    first, seen = {}, set()
    for record in (r for r in result.records if r.candidate.phase == "global"):
        if record.evaluation.configuration not in seen:
            seen.add(record.evaluation.configuration)
            first.setdefault(record.candidate.generation, Counter())[record.evaluation.steps] += 1
    assert first[1] == {100: 9}
    assert set(first[2]) == {300}
    assert set(first[3]) == {900}
    assert first[4] == {100: 9}
