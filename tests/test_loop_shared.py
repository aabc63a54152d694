"""Shared settings in a search: uniforms are tuned first, the search goes on with all of them, files tell of them."""

from __future__ import annotations

import csv
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from qratk.core import Configuration, ConfigurationError, Request
from qratk.core.evaluation import Evaluation
from qratk.core.result import SearchResult
from qratk.core.shared import SharedLadder
from qratk.evaluators.base import Evaluator
from qratk.evaluators.finetune import FineTuneEvaluator
from qratk.evaluators.frozen_divergence import FrozenDivergenceEvaluator
from qratk.loop import SearchLoop
from qratk.reporters.base import Destination, Reporter
from qratk.reporters.files import RunFiles
from qratk.reporters.multi import Reporters
from qratk.reporters.terminal import plan_lines
from qratk.run import files
from qratk.run.run import Run
from qratk.settings.recipe import autoqra
from qratk.testing import ToyEvaluator
from qratk.training.options import SHAREABLE

SHARED: dict[str, Any] = {"learning_rate": [1e-3, 3e-3, 1e-2], "rslora": [False, True]}
LANDSCAPE = {"best_rate": 1e-2, "rate_curvature": 0.5}


def settings(**changes: Any) -> SearchLoop:
    given: dict[str, Any] = {
        "evaluator": ToyEvaluator(num_layers=5, landscape=LANDSCAPE),
        "searcher": {"nsga2": {"offspring": 9, "population": 12}},
        "refiner": {"hill_climb": {"max_evaluations": 3}},
        "like": (4, 16),
        "steps": (10, 30, 90),
        "generations": 3,
        "hypervolume_tolerance": -1.0,
        "high_fidelity_candidates": 2,
        "shared": SHARED,
    }
    return autoqra(**{**given, **changes})


def search(run_dir: Path, reporters: Sequence[Reporter] = (), **changes: Any) -> SearchResult:
    reporter = Reporters(list(reporters))
    reporter.open(
        Destination(run_dir, {"model": {"model": "none", "learning_rate": 0.5}, "search": {"shared": SHARED}})
    )
    return settings(**changes).run(run_dir=run_dir, reporter=reporter, config={})


def told(result: SearchResult) -> list[tuple[str, str, int, float]]:
    return [
        (r.candidate.phase, str(r.evaluation.configuration), r.evaluation.steps, r.evaluation.score)
        for r in result.records
    ]


def test_every_uniform_is_tuned_and_its_best_settings_go_up_the_rungs(tmp_path: Path) -> None:
    result = search(tmp_path, generations=0, refiner="none")
    measured: dict[tuple[Any, ...], dict[int, list[Evaluation]]] = {}
    for record in result.records:
        assert record.candidate.phase == "baseline"
        rungs = measured.setdefault(record.evaluation.configuration.layers, {})
        rungs.setdefault(record.evaluation.steps, []).append(record.evaluation)
    problem = result.plan.problem
    assert set(measured) == {c.layers for c in problem.space.uniforms() if problem.feasible(c)}
    for rungs in measured.values():
        assert [len(rungs[steps]) for steps in (10, 30, 90)] == [6, 2, 1]
        assert {e.configuration.shared for e in rungs[10]} == set(problem.space.all_shared)
        for below, above in ((10, 30), (30, 90)):
            ranked = sorted(rungs[below], key=lambda e: -e.score)
            went = {e.configuration for e in rungs[above]}
            assert went == {e.configuration for e in ranked[: len(went)]}
    assert len(result.baselines) == len(measured)
    assert result.best.score == max(e.score for e in result.baselines)


def test_plan_counts_the_tuning_of_uniforms_and_references(tmp_path: Path) -> None:
    result = search(tmp_path, generations=0, refiner="none", references=[(16, 16)])
    counts = Counter(record.evaluation.steps for record in result.records)
    assert dict(result.plan.evaluations) == dict(sorted(counts.items()))
    reference = [r for r in result.records if r.candidate.phase == "reference"]
    assert Counter(r.evaluation.steps for r in reference) == {10: 6, 30: 2, 90: 1}
    (tuned,) = result.references
    assert tuned.configuration == reference[-1].evaluation.configuration
    assert tuned.steps == 90


def test_no_more_is_measured_than_planned(tmp_path: Path) -> None:
    result = search(tmp_path)
    counts = Counter(record.evaluation.steps for record in result.records)
    assert all(count <= result.plan.evaluations[steps] for steps, count in counts.items())


@pytest.mark.parametrize("searcher", ["nsga2", "bohb", "random", "decoupled"])
def test_answer_is_no_worse_than_the_tuned_uniforms_and_has_a_rate_of_its_own(tmp_path: Path, searcher: str) -> None:
    result = search(tmp_path, searcher=searcher)
    assert result.best.score >= max(e.score for e in result.baselines if e.ok)
    assert result.best.configuration in result.plan.problem.space
    assert result.best.configuration.settings["learning_rate"] == 1e-2  # what the landscape likes best
    assert all(e.configuration in result.plan.problem.space for e in result.history)


def test_search_proposes_other_settings_for_mixed_configurations(tmp_path: Path) -> None:
    result = search(tmp_path)
    mixed = [r.evaluation.configuration for r in result.records if r.candidate.phase == "global"]
    assert len({c.shared for c in mixed}) >= 3
    assert any("shared" in r.candidate.origin for r in result.records)


def test_rate_that_fits_is_worth_more_than_bits_and_ranks_at_a_poor_one(tmp_path: Path) -> None:
    poor = {"shared": {"learning_rate": [1e-3]}}
    gains = []
    for seed in range(3):
        scores = [
            search(tmp_path / f"{seed}-{len(changes)}", seed=seed, **changes).best.score for changes in ({}, poor)
        ]
        gains.append(scores[0] - scores[1])
    assert np.mean(gains) > 0.3  # a decade off costs 0.5


@pytest.mark.parametrize(
    ("limit", "refiner"),
    [
        (3, "hill_climb"),
        (45, "trust_region"),
        pytest.param(45, "hill_climb", marks=pytest.mark.slow),
        pytest.param(3, "trust_region", marks=pytest.mark.slow),
    ],
)
def test_interrupted_search_goes_on_to_the_same_end(tmp_path: Path, limit: int, refiner: str) -> None:
    class Interrupted(ToyEvaluator):
        def evaluate(self, group: Sequence[Request]) -> Sequence[Evaluation]:
            found = super().evaluate(group)
            if len(self.calls) > limit:
                raise KeyboardInterrupt
            return found

    changes = {"refiner": {refiner: {"max_evaluations": 3}}, "references": [(16, 16)]}
    straight = search(tmp_path / "straight", **changes)
    folder = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        search(folder, evaluator=Interrupted(num_layers=5, landscape=LANDSCAPE), **changes)
    resumed = search(folder, **changes)
    assert told(resumed) == told(straight)
    assert resumed.best == straight.best


def test_files_of_a_run_tell_of_the_settings_and_read_back(tmp_path: Path) -> None:
    result = search(tmp_path, [RunFiles()])
    best, run = result.best, Run.open(tmp_path)
    with (tmp_path / files.EVALUATIONS).open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["learning_rate"], row["rslora"]) for row in rows] == [
        (
            str(r.evaluation.configuration.settings["learning_rate"]),
            str(r.evaluation.configuration.settings["rslora"]).lower(),
        )
        for r in result.records
    ]
    assert run.best == best
    assert [e.configuration for e in run.baselines] == [e.configuration for e in result.baselines]
    assert dict(run.result.problem.shared) == {"learning_rate": (0.001, 0.003, 0.01), "rslora": (False, True)}
    model = yaml.safe_load((tmp_path / files.BEST).read_text())["model"]
    assert model == {
        "model": "none",
        "configuration": str(best.configuration.with_shared(())),
        **best.configuration.settings,
    }


def test_best_of_a_run_that_still_goes_on_has_its_settings(tmp_path: Path) -> None:
    result = search(tmp_path, [RunFiles()])
    unfinished = tmp_path / "unfinished"
    shutil.copytree(tmp_path, unfinished, ignore=shutil.ignore_patterns("unfinished"))
    (unfinished / files.RESULT).unlink()
    assert Run.open(unfinished).best == result.best


def test_plan_names_the_ladders(tmp_path: Path) -> None:
    lines = plan_lines(search(tmp_path, generations=0, refiner="none").plan)
    assert "learning_rate 0.001/0.003/0.01, rslora false/true" in lines[1]


def test_shared_steps_join_the_mutations_only_where_something_is_shared() -> None:
    def names(loop: SearchLoop) -> list[str]:
        return [str(getattr(operator, "component_name", "")) for operator in loop.operators]

    assert names(settings(shared={})) == ["sensitivity", "coupled"]
    assert names(settings()) == ["sensitivity", "coupled", "shared"]
    assert names(settings(mutations=["shared", "swap"])) == ["shared", "swap"]


@pytest.mark.parametrize(
    ("shared", "said"),
    [
        ({"learning_rat": [0.1]}, r"shared.learning_rat is no option .* these are alpha_over_rank, .*'learning_rate'"),
        ({"quantizers": ["nf4"]}, "shared.quantizers is no option that configurations may share"),
        ({"learning_rate": [-1e-3, 1e-3]}, "shared.learning_rate must be at least 0, got -0.001"),
        ({"learning_rate": [1e-2, 1e-3]}, "shared.learning_rate must be an ascending ladder"),
        ({"learning_rate": ["fast"]}, "shared.learning_rate must be a ladder of values that are each a number"),
        ({"warmup_steps": [0.5]}, "each a whole number, got 0.5"),
        ({"rslora": [0, 1]}, "each true or false, got 0"),
        ({"schedule": ["linear", "cubic"]}, "must be one of constant, linear, cosine, got 'cubic'"),
        ({"lora_dropout": [0.5, 1]}, r"shared.lora_dropout must lie in \[0, 1\), got 1"),
        ({"alpha_over_rank": [0, 1]}, "shared.alpha_over_rank must be positive, got 0"),
        ({"init": ["loftr"]}, "shared.init must be one of"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_shared_is_refused_with_its_name_before_a_search(shared: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        settings(shared=shared)


def test_an_evaluator_that_trains_nothing_at_first_has_settings_tuned_above_that() -> None:
    loop = settings(evaluator=FrozenDivergenceEvaluator())
    assert loop.tuned_above
    assert loop.settings_race == ((30, 6), (90, 1))
    assert not settings(evaluator=FrozenDivergenceEvaluator(), shared={}).tuned_above


def test_an_evaluator_that_knows_no_settings_refuses_them() -> None:
    class Plain(ToyEvaluator):
        def check_shared(self, ladder: SharedLadder) -> None:
            Evaluator.check_shared(self, ladder)

    with pytest.raises(ConfigurationError, match="'Plain', which scores bits and ranks alone"):
        settings(evaluator=Plain(num_layers=5))


@pytest.mark.parametrize("name", sorted(SHAREABLE))
def test_every_option_that_is_named_as_shareable_is_one(name: str) -> None:
    example = {"init": ("default", "loftq"), "rslora": (False, True), "schedule": ("linear", "cosine")}
    FineTuneEvaluator().check_shared(SharedLadder(name, example.get(name, (0,) if name != "alpha_over_rank" else (1,))))


@pytest.mark.parametrize("baselines", [True, False])
def test_fixed_configuration_keeps_its_settings_and_one_without_is_tuned_like_a_uniform(
    tmp_path: Path, baselines: bool
) -> None:
    texts = ["2:16 4:8*4 | learning_rate=0.001 rslora=true", "2:16 4:4*4"]
    searcher = {"fixed": {"configurations": texts}}
    result = search(tmp_path, searcher=searcher, refiner="none", uniform_baselines=baselines)
    own, bare = (Configuration.from_text(text) for text in texts)
    tuned: dict[int, list[Evaluation]] = {}
    for evaluation in (r.evaluation for r in result.records if r.candidate.phase == "global"):
        if evaluation.configuration.layers == bare.layers:
            tuned.setdefault(evaluation.steps, []).append(evaluation)
        else:
            assert evaluation.configuration == own
    assert [len(tuned[steps]) for steps in (10, 30, 90)] == [6, 2, 1]
    (last,) = tuned[90]
    assert last.configuration == max(tuned[30], key=lambda e: e.score).configuration
    counts = Counter(record.evaluation.steps for record in result.records)
    assert all(count <= result.plan.evaluations[steps] for steps, count in counts.items())
    assert result.history.get(own, 90) is not None


def test_candidates_of_a_searcher_that_leaves_settings_alone_race_at_their_best_ones(tmp_path: Path) -> None:
    result = search(tmp_path, searcher="decoupled", uniform_baselines=False, refiner="none")
    by_layers: dict[Any, list[Evaluation]] = {}
    for evaluation in (r.evaluation for r in result.records if r.evaluation.steps == 10):
        by_layers.setdefault(evaluation.configuration.layers, []).append(evaluation)
    assert all(len(found) == 6 for found in by_layers.values())
    best = {max(found, key=lambda e: e.score).configuration for found in by_layers.values()}
    assert {e.configuration for e in result.history if e.steps > 10} <= best
    counts = Counter(record.evaluation.steps for record in result.records)
    assert all(count <= result.plan.evaluations[steps] for steps, count in counts.items())
