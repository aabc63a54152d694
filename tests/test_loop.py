"""The search loop on a toy landscape: the promises of a search, without torch."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qratk.components import REGISTRIES
from qratk.core import (
    Candidate,
    ConfigurationError,
    Evaluation,
    History,
    InfeasibleBudgetError,
    ParetoFront,
    Request,
    RunDirectoryError,
    SearchError,
)
from qratk.core.evaluation import Status
from qratk.core.result import (
    GenerationSummary,
    Progress,
    Record,
    RefinementSummary,
    SearchPlan,
    SearchResult,
)
from qratk.core.work import Work
from qratk.loop import SearchLoop
from qratk.reporters.base import Destination, Reporter
from qratk.run.journal import Journal
from qratk.searchers.nsga2 import NSGA2
from qratk.testing import ToyEvaluator


class Recorder(Reporter):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.plans: list[SearchPlan] = []
        self.messages: list[str] = []
        self.works: list[Work] = []
        self.records: list[Record] = []
        self.progresses: list[Progress] = []
        self.generations: list[GenerationSummary] = []
        self.refinements: list[RefinementSummary] = []
        self.results: list[SearchResult] = []

    def open(self, destination: Destination) -> None:
        self._destination = destination

    def started(self, plan: SearchPlan) -> None:
        self.plans.append(plan)

    def message(self, text: str) -> None:
        self.messages.append(text)

    def working(self, work: Work) -> None:
        self.works.append(work)

    def progress(self, progress: Progress) -> None:
        self.progresses.append(progress)

    def evaluated(self, record: Record, progress: Progress) -> None:
        self.records.append(record)

    def generation(self, summary: GenerationSummary) -> None:
        self.generations.append(summary)

    def refinement(self, summary: RefinementSummary) -> None:
        self.refinements.append(summary)

    def finished(self, result: SearchResult) -> None:
        self.results.append(result)

    def close(self) -> None:
        pass


class InterruptedEvaluator(ToyEvaluator):
    """Is killed before its n-th evaluation."""

    def __init__(self, limit: int, **options: Any) -> None:
        super().__init__(**options)
        self.limit = limit

    def evaluate(self, group: Sequence[Request]) -> Sequence[Evaluation]:
        found = super().evaluate(group)
        if len(self.calls) > self.limit:
            raise KeyboardInterrupt
        return found


def loop(evaluator: ToyEvaluator | None = None, **changes: Any) -> SearchLoop:
    strategies = {
        "searcher": ("searchers", "nsga2", {"offspring": 8, "population": 12}),
        "refiner": ("refiners", "none", {}),
        "surrogate": ("surrogates", "huber", {}),
        "repair": ("repairs", "greedy", {}),
    }
    built = {name: REGISTRIES[kind].create(key, **options) for name, (kind, key, options) in strategies.items()}
    mutations = REGISTRIES["mutations"]
    settings: dict[str, Any] = {
        **built,
        "mutations": [mutations.create("sensitivity"), mutations.create("coupled")],
        "bits_importance": REGISTRIES["estimators"].create("fisher_residual"),
        "rank_importance": REGISTRIES["estimators"].create("gradient_spectrum"),
        "evaluator": evaluator or ToyEvaluator(num_layers=4),
        "like": (4, 16),
        "steps": (100, 300, 900),
        "generations": 3,
        "hypervolume_tolerance": -1.0,
        "high_fidelity_candidates": 2,
    }
    return SearchLoop(**{**settings, **changes})


def search(run_dir: Path, settings: SearchLoop, config: Any = None) -> tuple[SearchResult, Recorder]:
    recorder = Recorder()
    result = settings.run(run_dir=run_dir, reporter=recorder, config=config or {"seed": settings.seed})
    return result, recorder


def decisions(result: SearchResult) -> list[tuple[str, int, float, str, int]]:
    return [
        (str(r.evaluation.configuration), r.evaluation.steps, r.evaluation.score, r.candidate.origin, r.index)
        for r in result.records
    ]


def test_the_answer_fits_the_budget_and_is_no_worse_than_any_uniform_baseline(tmp_path: Path) -> None:
    for seed in range(4):
        result, _ = search(tmp_path / str(seed), loop(ToyEvaluator(num_layers=6, seed=seed), seed=seed))
        assert result.plan.problem.feasible(result.best.configuration)
        assert result.baselines
        assert all(result.best.score >= baseline.score for baseline in result.baselines)


def test_every_uniform_configuration_that_fits_is_measured_on_every_rung(tmp_path: Path) -> None:
    result, _ = search(tmp_path, loop())
    problem = result.plan.problem
    fitting = {c for c in problem.space.uniforms() if problem.feasible(c)}
    assert fitting == set(result.plan.baselines)
    for steps in (100, 300, 900):
        assert fitting <= {e.configuration for e in result.history.at(steps)}


def test_nothing_is_evaluated_twice(tmp_path: Path) -> None:
    evaluator = ToyEvaluator(num_layers=4)
    search(tmp_path, loop(evaluator, generations=6))
    counts = Counter((request.configuration, request.steps) for request in evaluator.calls)
    assert set(counts.values()) == {1}


def test_a_generation_shrinks_from_rung_to_rung(tmp_path: Path) -> None:
    result, _ = search(tmp_path, loop())
    first = Counter(r.evaluation.steps for r in result.records if r.candidate.generation == 1)
    assert first == {100: 8, 300: 3, 900: 2}


def test_promoted_candidates_are_those_that_scored_best_while_the_surrogate_is_not_trusted(tmp_path: Path) -> None:
    result, _ = search(tmp_path, loop(surrogate=REGISTRIES["surrogates"].create("none"), generations=1))
    ran = [r.evaluation for r in result.records if r.candidate.generation == 1]
    low = sorted((e for e in ran if e.steps == 100), key=lambda e: -e.score)
    assert {e.configuration for e in ran if e.steps == 300} == {e.configuration for e in low[:3]}


def test_the_front_holds_measurements_at_the_highest_rung_that_none_dominates(tmp_path: Path) -> None:
    result, _ = search(tmp_path, loop())
    measured = [e for e in result.history.at(900) if result.plan.problem.feasible(e.configuration)]
    assert set(result.front.evaluations) <= set(measured)
    for kept in result.front.evaluations:
        assert not any(
            other.score >= kept.score
            and other.footprint.storage_bytes <= kept.footprint.storage_bytes
            and (other.score, other.footprint.storage_bytes) != (kept.score, kept.footprint.storage_bytes)
            for other in measured
        )
    assert result.front == ParetoFront.of(measured)


def test_the_hypervolume_never_shrinks(tmp_path: Path) -> None:
    result, _ = search(tmp_path, loop(generations=6))
    volumes = [generation.hypervolume for generation in result.generations]
    assert len(volumes) == 6
    assert all(b >= a for a, b in itertools.pairwise(volumes))


def test_the_hypervolume_counts_from_the_first_generation_that_measures_anything(tmp_path: Path) -> None:
    class Late(ToyEvaluator):
        def evaluate(self, group: Sequence[Request]) -> Sequence[Evaluation]:
            lost = {r.configuration for r in group if r.candidate.generation == 1}
            return [
                dataclasses.replace(e, score=-math.inf, status="failed", reason="late")
                if e.configuration in lost
                else e
                for e in super().evaluate(group)
            ]

    result, _ = search(tmp_path, loop(Late(num_layers=4), uniform_baselines=False))
    first, second, third = (generation.hypervolume for generation in result.generations)
    assert first == 0.0
    assert 0.0 < second <= third < math.inf
    assert not any(math.isnan(generation.relative_progress) for generation in result.generations)


def test_the_global_phase_stops_when_the_hypervolume_stalls(tmp_path: Path) -> None:
    result, _ = search(tmp_path, loop(generations=50, hypervolume_tolerance=1e9, hypervolume_patience=2))
    # The first generation has no predecessor, so that progress counts from the second.
    assert len(result.generations) == 3
    assert "hypervolume" in result.stop_reasons["global"]


@pytest.mark.parametrize(
    ("limit", "refiner"),
    [
        (0, "none"),
        (7, "trust_region"),
        (33, "none"),
        pytest.param(0, "trust_region", marks=pytest.mark.slow),
        pytest.param(7, "none", marks=pytest.mark.slow),
        pytest.param(33, "trust_region", marks=pytest.mark.slow),
    ],
)
def test_a_search_that_was_killed_and_resumed_equals_an_uninterrupted_one(
    tmp_path: Path, limit: int, refiner: str
) -> None:
    def settings(evaluator: ToyEvaluator) -> SearchLoop:
        small = {"max_evaluations": 3, "pool_size": 60} if refiner == "trust_region" else {}
        return loop(evaluator, refiner=REGISTRIES["refiners"].create(refiner, **small), seed=3)

    whole, _ = search(tmp_path / "whole", settings(ToyEvaluator(num_layers=4)))
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "cut", settings(InterruptedEvaluator(limit, num_layers=4)))
    again = ToyEvaluator(num_layers=4)
    resumed, recorder = search(tmp_path / "cut", settings(again))
    assert decisions(resumed) == decisions(whole)
    assert resumed.best == whole.best
    assert resumed.generations[-1].hypervolume == whole.generations[-1].hypervolume
    assert recorder.plans[0].resumed == limit
    assert len(again.calls) == len(whole.records) - limit


def test_a_finished_search_is_answered_without_any_evaluation(tmp_path: Path) -> None:
    first, _ = search(tmp_path, loop())
    evaluator = ToyEvaluator(num_layers=4)
    second, _ = search(tmp_path, loop(evaluator))
    assert evaluator.calls == []
    assert decisions(second) == decisions(first)
    assert second.test_scores == first.test_scores


def test_a_run_directory_of_other_settings_is_refused(tmp_path: Path) -> None:
    search(tmp_path, loop(), {"search": {"seed": 0}})
    with pytest.raises(RunDirectoryError, match=r"search\.seed: 0 there, 1 now"):
        search(tmp_path, loop(), {"search": {"seed": 1}})
    with pytest.raises(RunDirectoryError, match=r"content\.landscape"):
        search(tmp_path, loop(ToyEvaluator(num_layers=4, noise=0.5)), {"search": {"seed": 0}})


def test_failed_evaluations_are_recorded_and_never_win(tmp_path: Path) -> None:
    result, _ = search(tmp_path, loop(ToyEvaluator(num_layers=4, failures=0.4), generations=4))
    failed = [r for r in result.records if not r.evaluation.ok]
    assert failed
    assert all("simulated" in r.evaluation.reason for r in failed)
    promoted = Counter(r.evaluation.configuration for r in result.records if r.candidate.phase == "global")
    assert all(promoted[r.evaluation.configuration] == 1 for r in failed if r.candidate.phase == "global")
    assert result.best.ok


def test_a_search_in_which_everything_fails_says_so(tmp_path: Path) -> None:
    with pytest.raises(SearchError, match="loss is not finite"):
        search(tmp_path, loop(ToyEvaluator(num_layers=4, failures=1.0)))


def test_test_data_is_scored_only_after_the_last_decision(tmp_path: Path) -> None:
    class Watchful(ToyEvaluator):
        def test(self, evaluation: Evaluation) -> dict[str, float]:
            seen.append(len(self.calls))
            return super().test(evaluation)

    seen: list[int] = []
    result, _ = search(tmp_path, loop(evaluator := Watchful(num_layers=4)))
    assert set(seen) == {len(evaluator.calls)}
    assert str(result.best.configuration) in result.test_scores


def test_the_answer_alone_is_tested_where_that_was_asked_for(tmp_path: Path) -> None:
    result, _ = search(tmp_path, loop(ToyEvaluator(num_layers=4), test="answer", references=[[16, 16]]))
    assert list(result.test_scores) == [str(result.best.configuration)]
    with pytest.raises(ConfigurationError, match="test must be true, false or 'answer'"):
        loop(ToyEvaluator(num_layers=4), test="all")


def test_references_are_measured_but_enter_no_history(tmp_path: Path) -> None:
    plain, _ = search(tmp_path / "a", loop(ToyEvaluator(num_layers=4)))
    result, _ = search(tmp_path / "b", loop(ToyEvaluator(num_layers=4), references=[[16, 16]]))
    (reference,) = result.references
    assert reference.configuration.bits == (16,) * 4
    assert result.best == plain.best
    assert reference.configuration not in {e.configuration for e in result.history}


def test_a_reference_that_is_given_twice_is_planned_measured_and_told_once(tmp_path: Path) -> None:
    result, _ = search(tmp_path / "twice", loop(ToyEvaluator(num_layers=4), references=[[16, 16], [16, 16]]))
    once, _ = search(tmp_path / "once", loop(ToyEvaluator(num_layers=4), references=[[16, 16]]))
    assert result.references == once.references
    assert [r.index for r in result.records] == list(range(len(once.records)))
    assert result.plan.evaluations == once.plan.evaluations


def test_checkpoints_are_discarded_except_those_of_the_front_the_baselines_and_the_best(tmp_path: Path) -> None:
    evaluator = ToyEvaluator(num_layers=4)
    result, _ = search(tmp_path, loop(evaluator))
    kept = {(e.configuration, e.steps) for e in result.history} - {
        (e.configuration, e.steps) for e in evaluator.discarded
    }
    wanted = {e.configuration for e in result.front.evaluations} | set(result.plan.baselines)
    assert kept == {(c, 900) for c in wanted | {result.best.configuration}}


def test_a_training_that_others_share_stays_until_the_search_is_over_and_while_any_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate, told = ToyEvaluator.evaluate, Recorder.generation
    evaluator = ToyEvaluator(num_layers=4)
    before_the_end: list[int] = []

    def shared(self: ToyEvaluator, group: Sequence[Request]) -> list[Evaluation]:
        found = []
        for evaluation in evaluate(self, group):
            bits = "".join(map(str, evaluation.configuration.bits))
            checkpoint = f"checkpoints/{bits}/{evaluation.steps}"
            found.append(dataclasses.replace(evaluation, trained_as=bits, checkpoint=checkpoint))
        return found

    def generation(self: Recorder, summary: GenerationSummary) -> None:
        before_the_end.append(len(evaluator.discarded))
        told(self, summary)

    monkeypatch.setattr(ToyEvaluator, "evaluate", shared)
    monkeypatch.setattr(Recorder, "generation", generation)
    result, _ = search(tmp_path, loop(evaluator))
    assert set(before_the_end) == {0}
    assert evaluator.discarded
    wanted = {e.configuration for e in result.front.evaluations} | set(result.plan.baselines)
    kept = {e.checkpoint for e in result.history if e.steps == 900 and e.configuration in wanted}
    assert len(kept) < len(wanted)  # some share one
    assert {e.checkpoint for e in evaluator.discarded} == {e.checkpoint for e in result.history} - kept


def test_an_impossible_budget_ends_before_anything_is_measured(tmp_path: Path) -> None:
    evaluator = ToyEvaluator(num_layers=4)
    with pytest.raises(InfeasibleBudgetError, match="smallest configuration"):
        search(tmp_path, loop(evaluator, like=None, limit="1MiB"))
    assert evaluator.calls == []


def test_a_budget_that_never_binds_is_said(tmp_path: Path) -> None:
    _, recorder = search(tmp_path, loop(like=None, limit="900GB", generations=1))
    assert any("never binds" in message for message in recorder.messages)


def test_a_cap_on_the_average_bits_is_kept(tmp_path: Path) -> None:
    result, _ = search(tmp_path, loop(like=(8, 16), max_average_bits=4.0))
    problem = result.plan.problem
    assert all(problem.memory.average_bits(e.configuration) <= 4 + 1e-9 for e in result.history)


def test_the_plan_is_an_upper_bound_and_exact_without_early_stops(tmp_path: Path) -> None:
    result, recorder = search(tmp_path, loop())
    done = Counter(r.evaluation.steps for r in result.records)
    assert dict(done) == dict(recorder.plans[0].evaluations)


def test_alpha_below_one_trades_score_for_bytes_but_never_below_the_best_uniform(tmp_path: Path) -> None:
    rich, _ = search(tmp_path / "a", loop(alpha=1.0))
    lean, _ = search(tmp_path / "b", loop(alpha=0.1))
    assert lean.best.footprint.storage_bytes <= rich.best.footprint.storage_bytes
    assert lean.best.score >= max(b.score for b in lean.baselines)


def test_the_comparison_with_a_baseline_covers_the_difference(tmp_path: Path) -> None:
    result, _ = search(tmp_path, loop())
    for comparison in result.comparisons:
        assert comparison.difference == result.best.score - comparison.baseline.score
        if comparison.baseline is not result.best:
            assert comparison.low <= comparison.difference <= comparison.high


def test_seconds_by_stage_count_no_time_twice(tmp_path: Path) -> None:
    class Slow(ToyEvaluator):
        def importance(self, estimator: Any, space: Any) -> Any:
            time.sleep(0.3)
            return super().importance(estimator, space)

    result, _ = search(tmp_path, loop(Slow(num_layers=4), generations=1))
    assert result.seconds["importance"] >= 0.6
    assert result.seconds["setup"] < 0.6
    parts = sum(seconds for stage, seconds in result.seconds.items() if stage != "total")
    assert result.seconds["total"] == pytest.approx(parts)


def test_random_states_are_in_the_journal(tmp_path: Path) -> None:
    search(tmp_path, loop())
    with Journal(tmp_path) as journal:
        saved = journal.decision("generation/1")
    generator = np.random.default_rng(0)
    generator.bit_generator.state = saved["rng"]
    assert saved["strategy"]["generation"] == 0


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="alpha"):
        loop(alpha=1.5)
    with pytest.raises(ConfigurationError, match="steps must be positive and ascending"):
        loop(steps=(300, 100))


class WithoutTestData(ToyEvaluator):
    """Has nothing to score at the end."""

    def prepare_test(self) -> bool:
        return False

    def test(self, evaluation: Evaluation) -> dict[str, float]:
        raise AssertionError("there are no test data")


def test_a_search_without_test_data_says_so_at_its_start_and_ends_without_test_scores(tmp_path: Path) -> None:
    result, recorder = search(tmp_path, loop(WithoutTestData(num_layers=4)))
    assert result.test_scores == {}
    assert any("no test data" in message for message in recorder.messages)
    _, silent = search(tmp_path / "silent", loop(WithoutTestData(num_layers=4), test=False))
    assert not any("no test data" in message for message in silent.messages)


class Cramped(ToyEvaluator):
    """Has too little memory for configurations of many bits, and takes some as NaN."""

    def __init__(self, reason: str, status: Status, *, roomy: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.reason, self.status, self.roomy = reason, status, roomy

    def evaluate(self, group: Sequence[Request]) -> Sequence[Evaluation]:
        return [self.cramped(evaluation) for evaluation in super().evaluate(group)]

    def cramped(self, evaluation: Evaluation) -> Evaluation:
        if self.roomy or sum(evaluation.configuration.bits) < 16:
            return evaluation
        return dataclasses.replace(
            evaluation, score=-math.inf, outcomes=(), status=self.status, reason=self.reason, checkpoint=None
        )


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        ("lost", "its process was killed"),
        ("failed", "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"),  # as it was recorded before
        ("failed", "RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
)
def test_what_the_machine_failed_is_tried_again_on_resume_and_said(tmp_path: Path, status: Status, reason: str) -> None:
    first, _ = search(tmp_path, loop(Cramped(reason, status, num_layers=4)))
    lost = {(e.configuration, e.steps) for e in first.history if not e.ok}
    assert lost
    evaluator = Cramped(reason, status, roomy=True, num_layers=4)
    second, recorder = search(tmp_path, loop(evaluator))
    assert {(r.configuration, r.steps) for r in evaluator.calls} >= lost
    assert all(e.ok for e in second.history)
    assert any(f"{len(lost)} evaluations failed" in message and reason in message for message in recorder.messages)
    third = ToyEvaluator(num_layers=4)
    again, recorder = search(tmp_path, loop(third))
    assert third.calls == []
    assert decisions(again) == decisions(second)


def test_what_failed_by_itself_is_not_tried_again(tmp_path: Path) -> None:
    search(tmp_path, loop(Cramped("NonFiniteLossError: the loss is nan", "failed", num_layers=4)))
    evaluator = Cramped("", "ok", roomy=True, num_layers=4)
    _, recorder = search(tmp_path, loop(evaluator))
    assert evaluator.calls == []
    assert recorder.messages == []


@pytest.mark.parametrize("stop", [SystemExit(), SystemExit(0)])
def test_a_searcher_that_exits_ends_the_search_with_an_error(tmp_path: Path, stop: SystemExit) -> None:
    class Leaving(NSGA2):
        def ask(self, history: History, rng: np.random.Generator) -> tuple[Candidate, ...]:
            raise stop

    with pytest.raises(SearchError, match="SystemExit"):
        search(tmp_path, loop(searcher=Leaving()))


def test_an_exit_with_a_status_of_its_own_is_left_alone(tmp_path: Path) -> None:
    class Interrupted(NSGA2):
        def ask(self, history: History, rng: np.random.Generator) -> tuple[Candidate, ...]:
            raise SystemExit(1)  # as Lightning makes of Ctrl-C

    with pytest.raises(SystemExit):
        search(tmp_path, loop(searcher=Interrupted()))


@pytest.mark.parametrize(
    ("wrong", "text"),
    [({"seed": -1}, "seed"), ({"max_average_bits": -3}, "max_average_bits"), ({"references": [[16]]}, r"\[16\]")],
)
def test_settings_that_cannot_be_are_named(wrong: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        loop(**wrong)


def test_costs_and_gains_of_rungs_reach_the_problem_and_a_resumed_search(tmp_path: Path) -> None:
    asked: list[str] = []

    class Telling(ToyEvaluator):
        def importance_by_rung(self, estimator: Any, space: Any, knob: Any) -> Any:
            asked.append(knob)
            steps = np.arange(1.0, 1 + len(space.ladder(knob)))
            return np.tile(1 / steps if knob == "bits" else steps, (space.num_layers, 1))

    plans = [search(tmp_path, loop(Telling(num_layers=4), generations=1))[1].plans[0] for _ in range(2)]
    assert asked == ["bits", "rank"]
    for problem in (plan.problem for plan in plans):
        assert problem.importance.costs == ((1.0, 1 / 2, 1 / 3),) * 4
        assert problem.importance.bits == (1.0,) * 4
        assert problem.importance.gains == ((1.0, 2.0, 3.0),) * 4
        assert problem.importance.rank == (3.0,) * 4
