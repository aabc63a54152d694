"""The answer's adapter averaged with others: the greedy recipe, its journal, and what becomes of checkpoints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from qratk.core.errors import ConfigurationError, RunDirectoryError
from qratk.core.evaluation import Evaluation, Member, scored_as
from qratk.core.result import SearchResult
from qratk.loop import SearchLoop
from qratk.reporters.base import Destination
from qratk.reporters.files import RunFiles
from qratk.reporters.multi import Reporters
from qratk.reporters.terminal import summary_lines
from qratk.run import files
from qratk.run.run import Run
from qratk.settings.identity import comparable
from qratk.settings.recipe import autoqra
from qratk.testing import ToyEvaluator


class Averaging(ToyEvaluator):
    """A mean scores by how many it is of, up to `helps`, and fails with `breaks`; adapters are files of text."""

    def __init__(self, helps: int = 3, *, breaks: int = 99, limit: int = 99) -> None:
        super().__init__(num_layers=5)
        self.helps, self.breaks, self.left = helps, breaks, limit
        self.asked: list[tuple[Member, ...]] = []

    @property
    def merges(self) -> bool:
        return True

    def merged(self, evaluation: Evaluation, members: Sequence[Member]) -> Evaluation:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        self.asked.append(tuple(members))
        assert not {e.member for e in self.discarded if e.steps == evaluation.steps} & set(members)
        if len(members) == self.breaks:
            return replace(evaluation, score=float("-inf"), status="failed", reason="not finite", merged=tuple(members))
        gain = 0.1 if len(members) <= self.helps else -0.1
        return replace(evaluation, score=evaluation.score + gain * len(members), merged=tuple(members))

    def save_adapter(self, evaluation: Evaluation, directory: Path) -> bool:
        directory.mkdir()
        (directory / "members").write_text(str(len(evaluation.merged)))
        return True

    def prepare_test(self) -> bool:
        return True

    def test(self, evaluation: Evaluation) -> dict[str, float]:
        return {"score": evaluation.score, "members": float(len(evaluation.merged))}


def settings(**changes: Any) -> SearchLoop:
    given: dict[str, Any] = {
        "evaluator": Averaging(),
        "searcher": {"random": {"offspring": 9}},
        "refiner": "none",
        "surrogate": "none",
        "like": (4, 16),
        "steps": (10, 90),
        "generations": 2,
        "hypervolume_tolerance": -1.0,
        "high_fidelity_candidates": 3,
        "merge": 6,
    }
    return autoqra(**{**given, **changes})


def search(run_dir: Path, **changes: Any) -> SearchResult:
    reporter = Reporters([RunFiles()])
    reporter.open(Destination(run_dir, {"model": {"model": "none"}, "search": {}}))
    return settings(**changes).run(run_dir=run_dir, reporter=reporter, config={})


def test_the_best_trainings_are_taken_in_one_after_another_as_long_as_that_scores_better(tmp_path: Path) -> None:
    evaluator = Averaging(helps=3)
    result = search(tmp_path, evaluator=evaluator)
    assert result.single is not None
    ranked = [e.member for e in sorted(result.history.at(90), key=lambda e: -e.score)][:6]
    assert ranked[0] == result.single.member
    assert result.best.merged == tuple(ranked[:3])
    assert result.best.score == pytest.approx(result.single.score + 0.3)
    tried = ((1, 1), (2, 2), (3, 3), (3, 4), (3, 5))  # so many that are in by then, and the next
    assert evaluator.asked == [(*ranked[:k], ranked[n]) for k, n in tried]
    own = scored_as(result.best.configuration, result.best.merged)
    assert own == f"{result.best.configuration} (mean of 3 trainings)"
    assert result.test_scores[own] == {"score": result.best.score, "members": 3.0}
    assert result.test_scores[str(result.best.configuration)] == {"score": result.single.score, "members": 0.0}
    written = Run(tmp_path).result
    assert written.single is not None
    assert written.tested(written.best) == result.test_scores[own] != written.tested(written.single)
    assert written.averages == result.averages == 5
    assert (tmp_path / files.ADAPTER / "members").read_text() == "3"


def test_files_and_the_terminal_say_that_the_score_is_of_a_mean(tmp_path: Path) -> None:
    result = search(tmp_path)
    written = json.loads((tmp_path / files.RESULT).read_text())
    assert [m["configuration"] for m in written["best"]["merged"]] == [str(m.configuration) for m in result.best.merged]
    assert result.single is not None
    assert written["single"]["score"] == result.single.score
    best = (tmp_path / files.BEST).read_text()
    assert "# score is that of 3 trainings averaged, whose adapter lies in adapter/; this file trains the first" in best
    lines = "\n".join(summary_lines(result))
    assert "averaged: the adapters of 3 trainings; the best of them alone has" in lines


@pytest.mark.parametrize("limit", [0, 1, 4])
def test_a_search_killed_while_it_averages_goes_on_to_the_same_end(tmp_path: Path, limit: int) -> None:
    whole = search(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "killed", evaluator=Averaging(limit=limit))
    evaluator = Averaging()
    resumed = search(tmp_path / "killed", evaluator=evaluator)
    assert resumed.best == whole.best
    assert resumed.single == whole.single
    assert resumed.averages == whole.averages == 5
    assert not evaluator.calls
    assert len(evaluator.asked) == 5 - limit


def test_a_mean_that_fails_is_left_out(tmp_path: Path) -> None:
    result = search(tmp_path, evaluator=Averaging(breaks=3))
    assert len(result.best.merged) == 2
    again = search(tmp_path, evaluator=Averaging(breaks=3))  # from the journal
    assert again.best == result.best


def test_fresh_seeds_are_averaged_too(tmp_path: Path) -> None:
    result = search(tmp_path, confirm={"candidates": 1, "seeds": 4}, merge=20, evaluator=Averaging(helps=20))
    assert {m.replicate for m in result.best.merged} == {0, 1, 2, 3, 4}


def test_once_it_is_over_checkpoints_of_what_was_averaged_are_left(tmp_path: Path) -> None:
    evaluator = Averaging(helps=2)
    result = search(tmp_path, confirm={"candidates": 1, "seeds": 4}, merge=20, evaluator=evaluator)
    gone = {e.member for e in evaluator.discarded if e.steps == 90}
    trained = {r.evaluation.member for r in result.records if r.evaluation.steps == 90}
    kept = {*(e.configuration for e in result.front.evaluations), *(e.configuration for e in result.baselines)}
    assert len(result.best.merged) == 2
    assert not gone & set(result.best.merged)
    left = {m for m in trained - gone if m.replicate or m.configuration not in kept}
    assert left <= {*result.best.merged, *(c.selected.member for c in result.confirmations)}


@pytest.mark.parametrize("changes", [{"merge": 0}, {"merge": 1}, {"evaluator": ToyEvaluator(num_layers=5)}])
def test_nothing_is_averaged_where_nobody_asks_or_nothing_can_be(tmp_path: Path, changes: dict[str, Any]) -> None:
    result = search(tmp_path, **changes)
    assert result.single is None
    assert not result.best.merged


def test_a_mean_that_is_no_better_leaves_the_best_training(tmp_path: Path) -> None:
    result = search(tmp_path, evaluator=Averaging(helps=0))
    assert result.single is None
    assert not result.best.merged
    assert (tmp_path / files.ADAPTER / "members").read_text() == "0"


def test_a_run_from_before_is_the_same_search() -> None:
    assert comparable({"search.merge": 0, "search.seeds": 1}) == comparable({})
    assert comparable({"search.merge": 4}) != comparable({})


def test_a_finished_run_is_read_back_with_the_mean_as_its_best(tmp_path: Path) -> None:
    result = search(tmp_path)
    run = Run(tmp_path)
    assert run.best == result.best
    document = json.loads((tmp_path / files.RESULT).read_text())
    document["best"]["merged"].pop()
    (tmp_path / files.RESULT).write_text(json.dumps(document))
    damaged = Run(tmp_path)
    with pytest.raises(RunDirectoryError, match="or of another run"):
        _ = damaged.best


def test_seeds_are_a_setting_that_the_search_picks(tmp_path: Path) -> None:
    result = search(tmp_path, seeds=4, shared={"learning_rate": [1e-3, 1e-2]}, merge=0)
    space = result.plan.problem.space
    assert [ladder.name for ladder in space.shared] == ["learning_rate", "replicate"]
    searched = [e for e in result.history if e.steps == 10]
    assert {e.configuration.settings["replicate"] for e in searched} == {0, 1, 2, 3}
    model = yaml.safe_load((tmp_path / files.BEST).read_text())["model"]
    assert model["replicate"] == result.best.configuration.settings["replicate"]
    for seeds in (1, 4):
        with pytest.raises(ConfigurationError, match=r"shared\.replicate.* is what search\.seeds makes a ladder of"):
            settings(seeds=seeds, shared={"replicate": [0, 1]})
    with pytest.raises(ConfigurationError, match="seeds must be under 1000"):
        settings(seeds=1000)


def test_the_largest_uniform_tunes_the_settings_for_those_that_none_exceeds(tmp_path: Path) -> None:
    rates = {"learning_rate": [1e-3, 3e-3, 1e-2]}
    ladders: dict[str, Any] = {"like": None, "limit": "78MB", "bits": (2, 3, 4, 8)}  # 4:4 fits, and 4:8 does not
    result = search(tmp_path, seeds=4, shared=rates, merge=0, **ladders)
    problem = result.plan.problem
    uniforms = [problem.space.uniform(4, 4), problem.space.uniform(3, 16)]
    assert all(problem.feasible(c) for c in (*uniforms, problem.space.uniform(3, 8), problem.space.uniform(2, 16)))
    baseline = [r.evaluation for r in result.records if r.candidate.phase == "baseline"]
    lowest, highest = ([e.configuration for e in baseline if e.steps == steps] for steps in (10, 90))
    first = [c for c in lowest if c.layers == uniforms[0].layers]
    assert [c.shared for c in first] == list(problem.space.spread_shared)
    assert {c.settings["learning_rate"] for c in first} == {1e-3, 3e-3, 1e-2}
    own = [e for e in baseline if e.steps == 90 and e.configuration in first]
    assert len(own) == 2
    best = max(own, key=lambda e: e.score).configuration
    others = lowest[len(first) :]
    assert [c.layers for c in others] == [c.layers for c in uniforms[1:]]
    assert {c.settings["learning_rate"] for c in others} == {best.settings["learning_rate"]}
    assert all(c.settings["replicate"] != best.settings["replicate"] for c in others)
    scores = {e.configuration: e.score for e in baseline if e.steps == 10}
    assert highest[2:] == sorted(others, key=lambda c: -scores[c])[:2]
    assert result.plan.evaluations[10] >= len([e for e in result.history if e.steps == 10])


def test_what_a_budget_leaves_goes_to_other_seeds_of_the_best(tmp_path: Path) -> None:
    result = search(tmp_path, seeds=4, shared={"learning_rate": [1e-3, 1e-2]}, full_runs=30, merge=0)
    tuned = [r.evaluation.configuration for r in result.records if r.candidate.phase == "tuning"]
    assert tuned
    assert not result.confirmations
    before = [r.evaluation for r in result.records if r.candidate.phase != "tuning" and r.evaluation.steps == 90]
    rates = {}
    for e in sorted(before, key=lambda e: -e.score):
        rates.setdefault(e.configuration.layers, e.configuration.settings["learning_rate"])
    assert all(c.settings["learning_rate"] == rates[c.layers] for c in tuned[:3])


class Choosy(Averaging):
    """The second best helps only beside the third best."""

    def merged(self, evaluation: Evaluation, members: Sequence[Member]) -> Evaluation:
        self.asked.append(tuple(members))
        ranked = sorted((m for m in self.scores), key=lambda m: -self.scores[m])
        known = [ranked.index(m) for m in members]
        better = known in ([0, 2], [0, 2, 1])
        return replace(
            evaluation, score=evaluation.score + (0.1 if better else -0.1) * len(known), merged=tuple(members)
        )

    @property
    def scores(self) -> dict[Member, float]:
        measured = (self.measure(r.configuration, r.steps) for r in self.calls if r.steps == 90)
        return {e.member: e.score for e in measured}


def test_what_did_not_help_at_first_is_tried_again_beside_those_that_came_later(tmp_path: Path) -> None:
    evaluator = Choosy()
    result = search(tmp_path, evaluator=evaluator)
    ranked = sorted(evaluator.scores, key=lambda m: -evaluator.scores[m])
    assert result.best.merged == (ranked[0], ranked[2], ranked[1])
    assert len(set(evaluator.asked)) == len(evaluator.asked)  # nothing is scored twice
