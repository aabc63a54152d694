"""A budget of full runs: the search ends within it, and what it leaves goes to settings and to fresh seeds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qratk.core import Configuration, ConfigurationError, Request, SearchError
from qratk.core.effort import Effort
from qratk.core.evaluation import Evaluation
from qratk.core.result import SearchResult
from qratk.loop import SearchLoop
from qratk.reporters.multi import Reporters
from qratk.settings.identity import comparable
from qratk.settings.recipe import autoqra
from qratk.testing import ToyEvaluator

SHARED: dict[str, Any] = {"learning_rate": [1e-3, 3e-3, 1e-2], "rslora": [False, True]}
UNIFORM: dict[str, Any] = {"generations": 0, "bits": [4]}
FIXED: dict[str, Any] = {"searcher": {"fixed": {"configurations": ["4:8*5"]}}, "uniform_baselines": False}
AT_ONCE: dict[str, Any] = {
    "searcher": {"random": {"offspring": 3}},
    "multi_fidelity": False,
    "uniform_baselines": False,
}
LAST: dict[str, Any] = {"promotion": "last", "uniform_baselines": False, "high_fidelity_candidates": 1}


class Toy(ToyEvaluator):
    """Measures all that is asked for at once."""

    def __init__(self) -> None:
        super().__init__(num_layers=5, noise=0.03)

    def groups(self, requests: Sequence[Request]) -> Iterator[Sequence[Request]]:
        if requests:
            yield requests


def settings(**changes: Any) -> SearchLoop:
    given: dict[str, Any] = {
        "evaluator": Toy(),
        "searcher": {"random": {"offspring": 9}},
        "refiner": "none",
        "surrogate": "none",
        "like": (4, 16),
        "steps": (10, 30, 90),
        "generations": 3,
        "hypervolume_tolerance": -1.0,
        "high_fidelity_candidates": 2,
        "shared": SHARED,
    }
    return autoqra(**{**given, **changes})


def search(run_dir: Path, **changes: Any) -> SearchResult:
    return settings(**changes).run(run_dir=run_dir, reporter=Reporters([]), config={})


def trained(result: SearchResult, untrained: int | None = None) -> float:
    """Full runs, counted apart from the loop: the longest training of each configuration and seed."""
    longest: dict[tuple[Configuration, int], int] = {}
    for record in result.records:
        evaluation = record.evaluation
        if record.candidate.phase != "reference" and evaluation.steps != untrained:
            key = evaluation.configuration, evaluation.replicate
            longest[key] = max(evaluation.steps, longest.get(key, 0))
    return sum(longest.values()) / 90


def phases(result: SearchResult) -> Counter[str]:
    return Counter(record.candidate.phase for record in result.records)


@pytest.mark.parametrize("recipe", [{}, UNIFORM, FIXED, AT_ONCE, LAST, {"refiner": {"hill_climb": {}}}])
@pytest.mark.parametrize("runs", [22, 40.5])
def test_every_recipe_takes_the_budget_and_no_more(tmp_path: Path, recipe: dict[str, Any], runs: float) -> None:
    result = search(tmp_path, full_runs=runs, references=[[8, 16]], **recipe)
    assert runs - 1.0 <= trained(result) <= runs
    assert result.stop_reasons["budget"] == f"{trained(result):.2f} of {runs:g} full runs are trained"
    counts = Counter(record.evaluation.steps for record in result.records)
    assert all(counts[steps] <= result.plan.evaluations[steps] for steps in counts)


def test_what_a_recipe_without_a_search_leaves_goes_to_settings_first_and_then_to_seeds(tmp_path: Path) -> None:
    result = search(tmp_path, full_runs=40, **FIXED)
    tuned = [r.evaluation.configuration for r in result.records if r.candidate.phase == "tuning"]
    assert {c.layers for c in tuned} == {result.best.configuration.layers}
    assert len(result.history.at(90)) == len(result.plan.problem.space.all_shared)  # every combination at the top
    seeds = [len(own.replicates) for own in result.confirmations]
    assert len(seeds) == 3
    assert max(seeds) - min(seeds) <= 1
    assert min(seeds) >= 10
    ranked = sorted(result.history.at(90), key=lambda e: -e.score)[:3]
    assert {c.selected for c in result.confirmations} == set(ranked)
    assert result.confirmed is not None
    assert result.best == result.confirmed.delivered
    assert result.confirmed.mean == max(c.mean for c in result.confirmations)


def test_a_small_rest_goes_to_settings_alone(tmp_path: Path) -> None:
    result = search(tmp_path, full_runs=10, **UNIFORM)
    assert phases(result)["tuning"]
    assert not result.confirmations


def test_without_a_ladder_of_settings_the_rest_goes_to_seeds(tmp_path: Path) -> None:
    result = search(tmp_path, full_runs=20, shared={}, **UNIFORM)
    assert "tuning" not in phases(result)
    assert sum(len(own.replicates) for own in result.confirmations) == 20 - 3  # three uniforms, a full run each


def test_an_evaluator_without_seeds_leaves_what_settings_do_not_take(tmp_path: Path) -> None:
    class Seedless(Toy):
        @property
        def replicates(self) -> bool:
            return False

    result = search(tmp_path, full_runs=40, evaluator=Seedless(), **FIXED)
    assert not result.confirmations
    assert trained(result) == 6


def test_the_best_settings_of_the_best_layers_come_first(tmp_path: Path) -> None:
    result = search(tmp_path, full_runs=11, **UNIFORM)
    before = [r.evaluation for r in result.records if r.candidate.phase == "baseline"]
    tuned = [r.evaluation for r in result.records if r.candidate.phase == "tuning" and r.evaluation.steps == 90]
    top = sorted((e for e in before if e.steps == 90), key=lambda e: -e.score)
    assert [e.configuration.layers for e in tuned[:3]] == [e.configuration.layers for e in top]
    for evaluation in tuned[:3]:  # the second best at the middle rung
        layers = evaluation.configuration.layers
        middle = sorted(
            (e for e in before if e.steps == 30 and e.configuration.layers == layers), key=lambda e: -e.score
        )
        assert evaluation.configuration == middle[1].configuration


def test_a_confirmation_that_was_asked_for_is_kept_a_part_of_the_budget(tmp_path: Path) -> None:
    result = search(tmp_path, full_runs=30, confirm={"candidates": 2, "seeds": 3}, refiner={"hill_climb": {}})
    assert trained(result) <= 30
    assert all(len(own.replicates) >= 3 for own in result.confirmations)
    with pytest.raises(ConfigurationError, match="full_runs must be over 12, which confirm takes; got 12"):
        settings(full_runs=12, confirm={})


def test_a_budget_that_the_baselines_exceed_is_refused_before_the_first_step(tmp_path: Path) -> None:
    evaluator = Toy()
    with pytest.raises(ConfigurationError, match=r"full_runs is 2, .* uniform baselines alone \(1\) take 2\.1; raise"):
        search(tmp_path, full_runs=2, evaluator=evaluator)
    with pytest.raises(ConfigurationError, match=r"full_runs is 5, .* uniform baselines alone \(3\) take 5\.3; raise"):
        search(tmp_path / "each", full_runs=5, evaluator=evaluator, **UNIFORM)
    assert not evaluator.calls
    with pytest.raises(SearchError, match="nothing reached 90 steps within 1 full runs; raise full_runs"):
        search(tmp_path / "fixed", full_runs=1, **FIXED)


class Interrupted(Toy):
    """Is killed at its n-th group."""

    def __init__(self, left: int) -> None:
        super().__init__()
        self.left = left

    def evaluate(self, group: Sequence[Request]) -> Sequence[Evaluation]:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().evaluate(group)


@pytest.mark.parametrize("groups", [2, 4, 7, 10])
def test_a_search_within_a_budget_that_was_killed_goes_on_to_the_same_end(tmp_path: Path, groups: int) -> None:
    def told(result: SearchResult) -> list[Any]:
        return [(r.candidate, replace(r.evaluation, seconds=0.0)) for r in result.records]

    whole = search(tmp_path / "whole", full_runs=24, **UNIFORM)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "killed", evaluator=Interrupted(groups), full_runs=24, **UNIFORM)
    resumed = search(tmp_path / "killed", full_runs=24, **UNIFORM)
    assert told(resumed) == told(whole)
    assert resumed.best == whole.best
    assert resumed.stop_reasons == whole.stop_reasons


def test_run_directories_from_before_there_was_a_budget_are_compared_without() -> None:
    assert comparable({"search.full_runs": None, "search.alpha": 1.0}) == {"search.alpha": 1.0}
    assert comparable({"search.full_runs": 20}) == {"search.full_runs": 20}


def test_effort_counts_what_goes_on_or_is_shared_once() -> None:
    footprint = ToyEvaluator(num_layers=1).footprint(Configuration.from_text("4:8"))
    effort = Effort(90, untrained=1)

    def add(text: str, steps: int, **changes: Any) -> float:
        effort.add(Evaluation(Configuration.from_text(text), steps, **{"score": 0.5, **changes}, footprint=footprint))
        return effort.steps

    assert add("4:8", 1) == 0  # a rung that trains nothing
    assert add("4:8", 30) == 30
    assert add("4:8", 90) == 90
    assert add("4:4", 90, trained_as=Configuration.from_text("4:8").digest) == 90
    assert add("4:8", 90, replicate=1) == 180
    assert add("2:8", 30, score=-math.inf, status="failed") == 210
    assert effort.full_runs == 210 / 90
    assert Effort(90, untrained=1, shared_runs=1).full_runs == 1  # before any candidate


class Frozen(Toy):
    """Trains nothing at the lowest rung: bits alone decide there, as with the divergence of frozen weights."""

    @property
    def proxy(self) -> str:
        return "what bits alone give"

    def measure(self, configuration: Configuration, steps: int, replicate: int = 0) -> Evaluation:
        if steps != 10:
            return super().measure(configuration, steps, replicate)
        plain = super().measure(Configuration.of(configuration.bits, [4] * len(configuration)), steps)
        return replace(plain, configuration=configuration)


@pytest.mark.parametrize("baselines", [False, True])
@pytest.mark.parametrize("promotion", ["last", "each"])
@pytest.mark.parametrize("searcher", [{"nsga2": {"population": 10, "offspring": 8}}, {"decoupled": {}}])
def test_where_the_lowest_rung_trains_nothing_the_few_that_it_picks_are_tuned_above_it(
    tmp_path: Path, promotion: str, baselines: bool, searcher: dict[str, Any]
) -> None:
    changes = {"promotion": promotion, "uniform_baselines": baselines, "searcher": searcher}
    result = search(tmp_path, evaluator=Frozen(), high_fidelity_candidates=1, generations=2, **changes)
    at = {steps: [e for e in result.history if e.steps == steps] for steps in (10, 30, 90)}
    assert at[10]
    assert not any(e.configuration.shared for e in at[10])
    assert all(len(e.configuration.shared) == 2 for e in (*at[30], *at[90]))
    picked = {e.configuration.layers for e in at[30]}
    assert len(at[30]) == 6 * len(picked)  # every combination
    assert len(at[90]) == 1 * len(picked)  # of which the best goes up
    for e in at[90]:
        own = [other for other in at[30] if other.configuration.layers == e.configuration.layers]
        assert max(own, key=lambda other: other.score).configuration == e.configuration
    counts = {steps: len(found) for steps, found in at.items()}
    assert all(counts[steps] <= result.plan.evaluations[steps] for steps in counts)
    assert result.best.configuration.shared


def test_where_one_reached_the_top_the_next_best_of_the_rungs_below_are_tuned_too(tmp_path: Path) -> None:
    evaluator = Frozen()
    result = search(tmp_path, evaluator=evaluator, full_runs=9, **LAST)
    first, *others = dict.fromkeys(e.configuration.layers for e in result.history.at(90))
    tuned = [r.evaluation.configuration.layers for r in result.records if r.candidate.phase == "tuning"]
    problem = result.plan.problem
    proxies = sorted((e for e in result.history.at(10) if problem.fits(e)), key=lambda e: -e.score)
    assert proxies[0].configuration.layers == first
    assert others == [e.configuration.layers for e in proxies[1:3]]
    assert set(tuned) == {first, *others}
    assert trained(result, untrained=10) > 8


def test_a_rung_that_trains_nothing_is_not_counted(tmp_path: Path) -> None:
    result = search(tmp_path, evaluator=Frozen(), full_runs=20, **LAST)
    assert 19 <= trained(result, untrained=10) <= 20
    assert trained(result) > 20
