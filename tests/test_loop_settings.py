"""Settings of the loop that baselines and ablations need: promotion, caps, budgets off the ladders."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qratk.core import ConfigurationError, ParetoFront
from qratk.core.result import SearchResult
from qratk.reporters.multi import Reporters
from qratk.settings.recipe import autoqra
from qratk.testing import ToyEvaluator


def search(run_dir: Path, **changes: Any) -> SearchResult:
    settings: dict[str, Any] = {
        "evaluator": ToyEvaluator(num_layers=6),
        "searcher": {"nsga2": {"offspring": 9, "population": 12}},
        "refiner": "none",
        "like": (4, 16),
        "generations": 3,
        "hypervolume_tolerance": -1.0,
        "high_fidelity_candidates": 2,
    }
    return autoqra(**{**settings, **changes}).run(run_dir=run_dir, reporter=Reporters([]), config={})


def rungs(result: SearchResult) -> Counter[int]:
    return Counter(record.evaluation.steps for record in result.records)


def test_without_uniform_baselines_only_the_strategy_is_measured(tmp_path: Path) -> None:
    result = search(tmp_path, uniform_baselines=False)
    assert result.baselines == ()
    assert {record.candidate.phase for record in result.records} == {"global"}


def test_promotion_of_the_last_judges_generations_by_short_runs_and_continues_the_best_of_all(tmp_path: Path) -> None:
    result = search(tmp_path, promotion="last", uniform_baselines=False, surrogate="none")
    assert rungs(result) == {100: 27, 300: 3, 900: 2}
    shorts = sorted(result.history.at(100), key=lambda e: -e.score)
    assert {e.configuration for e in result.history.at(300)} == {e.configuration for e in shorts[:3]}
    assert [r.evaluation.steps for r in result.records][-5:] == [300] * 3 + [900] * 2
    assert result.plan.evaluations == {100: 27, 300: 3, 900: 2}


@pytest.mark.parametrize("searcher", ["hyperband", {"fixed": {"configurations": ["4:8*6", "2:16*6"]}}])
def test_promotion_of_the_last_runs_every_generation_at_the_lowest_rung(tmp_path: Path, searcher: Any) -> None:
    result = search(tmp_path, promotion="last", uniform_baselines=False, searcher=searcher)
    first = {e.configuration for e in result.history.at(100)}
    assert first == {e.configuration for e in result.history}
    assert all(count <= result.plan.evaluations[steps] for steps, count in rungs(result).items())


def test_promotion_of_the_last_is_resumed_with_the_same_decisions(tmp_path: Path) -> None:
    whole = search(tmp_path / "a", promotion="last")
    evaluator = ToyEvaluator(num_layers=6)
    search(tmp_path / "b", promotion="last", generations=3)
    again = search(tmp_path / "b", promotion="last", evaluator=evaluator)
    assert evaluator.calls == []
    assert [r.evaluation for r in again.records] == [r.evaluation for r in whole.records]


def test_promotion_by_front_continues_the_short_runs_that_none_dominates(tmp_path: Path) -> None:
    result = search(tmp_path, promote_by="front", surrogate="none", generations=1, uniform_baselines=False)
    shorts = result.history.at(100)
    front = ParetoFront.of(shorts).evaluations
    dominated = sorted((e for e in shorts if e not in front), key=lambda e: -e.score)
    assert dominated[0].score > front[0].score  # by score alone, it would go on before that one
    assert {e.configuration for e in result.history.at(300)} <= {e.configuration for e in front}


@pytest.mark.parametrize(("cap", "refiner"), [(3, "none"), (8, "none"), (11, "trust_region")])
def test_no_more_evaluations_at_the_highest_rung_than_the_cap(tmp_path: Path, cap: int, refiner: str) -> None:
    result = search(tmp_path, max_evaluations=cap, refiner=refiner, generations=2)
    assert rungs(result)[900] == cap
    assert result.plan.evaluations[900] == cap
    assert f"cap of {cap} evaluations" in " ".join(result.stop_reasons.values())


def test_a_budget_may_be_like_a_uniform_configuration_off_the_ladders(tmp_path: Path) -> None:
    on = search(tmp_path / "on", generations=1)
    off = search(tmp_path / "off", bits=[2, 8], ranks=[4, 8], generations=1)
    assert off.plan.problem.budget == on.plan.problem.budget


@pytest.mark.parametrize(
    "wrong",
    [
        {"promotion": "never"},
        {"promote_by": "luck"},
        {"max_evaluations": 0},
        {"seed": -1},
        {"max_average_bits": 0},
        {"max_average_bits": -3},
        {"references": [[16]]},
        {"name": "../../x"},
        {"name": ""},
        {"limit": "1e400GB", "like": None},
    ],
)
def test_settings_that_make_no_sense_are_named(wrong: dict[str, Any]) -> None:
    name = next(iter(wrong))
    with pytest.raises(ConfigurationError, match=name) as caught:
        autoqra(**{"evaluator": ToyEvaluator(), "like": (4, 16), **wrong})
    assert [problem.option for problem in caught.value.problems] == [name]
