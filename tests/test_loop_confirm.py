"""Confirmation: the best few run again with fresh seeds, the answer chosen and reported by what that says."""

from __future__ import annotations

import csv
import math
import sqlite3
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from qratk.cli.gain import gain_text
from qratk.core import Configuration, ConfigurationError, Request
from qratk.core.evaluation import Evaluation, replicate_seed
from qratk.core.result import SearchResult
from qratk.evaluators.finetune import FineTuneEvaluator
from qratk.evaluators.frozen_divergence import FrozenDivergenceEvaluator
from qratk.loop import SearchLoop
from qratk.loop.statistics import mean_over_seeds
from qratk.reporters.base import Destination, Reporter
from qratk.reporters.figures import progress_figure
from qratk.reporters.files import RunFiles
from qratk.reporters.multi import Reporters
from qratk.reporters.tensorboard import TensorBoardReporter
from qratk.reporters.terminal import summary_lines
from qratk.run import files
from qratk.run.run import Run
from qratk.settings.recipe import autoqra
from qratk.testing import ToyEvaluator

CONFIRM = {"candidates": 3, "seeds": 4}
NOISE = 0.05


class Toy(ToyEvaluator):
    """Measures all that is asked for at once, as one group of the journal."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(num_layers=5, seed=seed, noise=NOISE)

    def groups(self, requests: Sequence[Request]) -> Iterator[Sequence[Request]]:
        if requests:
            yield requests


def settings(**changes: Any) -> SearchLoop:
    given: dict[str, Any] = {
        "evaluator": Toy(),
        "searcher": {"random": {"offspring": 9}},
        "refiner": {"hill_climb": {"max_evaluations": 3}},
        "surrogate": "none",
        "like": (4, 16),
        "steps": (10, 30, 90),
        "generations": 3,
        "hypervolume_tolerance": -1.0,
        "high_fidelity_candidates": 3,
        "confirm": CONFIRM,
    }
    return autoqra(**{**given, **changes})


def search(run_dir: Path, reporters: Sequence[Reporter] = (), **changes: Any) -> SearchResult:
    reporter = Reporters(list(reporters))
    reporter.open(Destination(run_dir, {"model": {"model": "none"}}))
    return settings(**changes).run(run_dir=run_dir, reporter=reporter, config={})


def told(result: SearchResult) -> list[tuple[str, int, int, float, str]]:
    return [
        (
            str(r.evaluation.configuration),
            r.evaluation.steps,
            r.evaluation.replicate,
            r.evaluation.score,
            str(r.candidate),
        )
        for r in result.records
    ]


def test_the_best_and_the_best_uniform_are_run_again_and_the_largest_mean_is_the_answer(tmp_path: Path) -> None:
    changed = of_a_fresh_seed = 0
    for seed in range(5):
        evaluator = Toy(seed)
        result = search(tmp_path / str(seed), evaluator=evaluator, seed=seed)
        problem, highest = result.plan.problem, result.plan.ladder.highest
        able = sorted((e for e in result.history.at(highest) if problem.fits(e)), key=lambda e: -e.score)
        uniform = max(result.baselines, key=lambda e: e.score)
        contenders = [*able[:3], *([] if uniform in able[:3] else [uniform])]
        assert {c.selected.configuration for c in result.confirmations} == {e.configuration for e in contenders}
        for own in result.confirmations:
            truth = [evaluator.landscape.score(own.configuration, highest, number) for number in range(1, 5)]
            assert [e.replicate for e in own.replicates] == [1, 2, 3, 4]
            assert own.scores == pytest.approx(truth)
            assert own.mean == pytest.approx(statistics.fmean(truth))  # without the run that selected it
            assert own.low < own.mean < own.high
        means = [c.mean for c in result.confirmations]
        assert means == sorted(means, reverse=True)
        assert result.confirmed is result.confirmations[0]
        assert result.best.configuration == result.confirmed.configuration
        assert result.best.score == max(result.confirmed.selected.score, *result.confirmed.scores)
        assert result.confirmed.mean >= next(c.mean for c in result.confirmations if c.selected == uniform)
        of_a_fresh_seed += result.best.replicate > 0
        changed += result.best.configuration != able[0].configuration
    assert changed  # else the first run decides
    assert of_a_fresh_seed


def test_the_difference_to_the_best_uniform_is_paired_by_seed_and_the_others_by_item(tmp_path: Path) -> None:
    result = search(tmp_path)
    assert result.confirmed is not None
    uniform = max(result.baselines, key=lambda e: e.score)
    (paired,) = [c for c in result.comparisons if c.over == "seeds"]
    assert paired.baseline == uniform
    theirs = next(c for c in result.confirmations if c.selected == uniform)
    differences = [a - b for a, b in zip(result.confirmed.scores, theirs.scores, strict=True)]
    assert (paired.difference, paired.low, paired.high) == pytest.approx(mean_over_seeds(differences))
    assert {c.over for c in result.comparisons} == {"seeds", "items"}


def test_an_interval_over_seeds_is_student_s() -> None:
    mean, low, high = mean_over_seeds([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert high - mean == pytest.approx(4.302653 / math.sqrt(3))  # t(2) at .975, s = 1
    assert mean - low == pytest.approx(high - mean)
    assert mean_over_seeds([0.5])[0] == 0.5
    assert all(map(math.isnan, [*mean_over_seeds([0.5])[1:], *mean_over_seeds([])]))


def test_nothing_but_the_answer_depends_on_confirmation(tmp_path: Path) -> None:
    confirmed, plain = search(tmp_path / "a"), search(tmp_path / "b", confirm=None)
    searched = [row for row in told(confirmed) if row[2] == 0]
    assert searched == told(plain)
    assert not plain.confirmations
    assert plain.confirmed is None
    assert len(told(confirmed)) - len(searched) == 4 * len(confirmed.confirmations)
    assert len(confirmed.history) == len(plain.history)


class Interrupted(ToyEvaluator):
    """Is killed at its n-th run with a fresh seed, before it is recorded."""

    def __init__(self, limit: int) -> None:
        super().__init__(num_layers=5, noise=NOISE)
        self.left = limit

    def evaluate(self, group: Sequence[Request]) -> Sequence[Evaluation]:
        self.left -= sum(request.replicate > 0 for request in group)
        if self.left < 0:
            raise KeyboardInterrupt
        return super().evaluate(group)


@pytest.mark.parametrize("limit", [0, 2, 5, 11])
def test_a_search_killed_in_the_middle_of_confirmation_goes_on_to_the_same_end(tmp_path: Path, limit: int) -> None:
    whole = search(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "killed", evaluator=Interrupted(limit))
    evaluator = Toy()
    resumed = search(tmp_path / "killed", evaluator=evaluator)
    assert told(resumed) == told(whole)
    assert resumed.confirmations == whole.confirmations
    assert resumed.best == whole.best
    assert len(evaluator.calls) == 4 * len(whole.confirmations) - limit


def test_a_finished_search_is_confirmed_later(tmp_path: Path) -> None:
    once, plain = search(tmp_path / "once"), search(tmp_path / "later", confirm=None)
    evaluator = Toy()
    later = search(tmp_path / "later", evaluator=evaluator)
    assert told(later) == told(once)
    assert {request.replicate for request in evaluator.calls} == {1, 2, 3, 4}
    assert plain.best in [c.selected for c in later.confirmations]


class WithTestData(Toy):
    """Has test data, by which each training scores what tells it."""

    def prepare_test(self) -> bool:
        return True

    def test(self, evaluation: Evaluation) -> dict[str, float]:
        return {"score": evaluation.score, "replicate": float(evaluation.replicate)}


def test_test_scores_are_those_of_the_training_that_is_delivered_also_where_another_was_tested_before(
    tmp_path: Path,
) -> None:
    fresh = 0
    for seed in range(24):
        given: dict[str, Any] = {"seed": seed, "test": True}
        before = search(tmp_path / str(seed), evaluator=WithTestData(seed), confirm=None, **given)
        result = search(tmp_path / str(seed), evaluator=WithTestData(seed), **given)
        scores = result.test_scores[str(result.best.configuration)]
        assert scores == {"score": result.best.score, "replicate": result.best.replicate}
        fresh += result.best.replicate > 0 and str(result.best.configuration) in before.test_scores
    assert fresh


def test_the_plan_counts_the_runs_with_fresh_seeds(tmp_path: Path) -> None:
    plain = settings(confirm=None).planned_evaluations(4)
    assert settings().planned_evaluations(4) == {**plain, 90: plain[90] + 4 * 4}
    assert settings(uniform_baselines=False).planned_replicates == 3 * 4
    result = search(tmp_path)
    replicates = sum(r.evaluation.replicate > 0 for r in result.records)
    assert replicates <= settings().planned_replicates
    assert result.plan.evaluations[90] >= sum(r.evaluation.steps == 90 for r in result.records)


def test_a_cap_on_evaluations_leaves_confirmation_alone(tmp_path: Path) -> None:
    result = search(tmp_path, max_evaluations=8)
    assert len(result.history.at(90)) <= 8
    assert all(len(own.replicates) == 4 for own in result.confirmations)


class Fragile(Toy):
    """The configuration that scores best fails with the second fresh seed, by its own fault or by the machine's."""

    def __init__(self, which: Configuration, status: str) -> None:
        super().__init__()
        self.which, self.status = which, status

    def measure(self, configuration: Configuration, steps: int, replicate: int = 0) -> Evaluation:
        found = super().measure(configuration, steps, replicate)
        if replicate != 2 or configuration != self.which:
            return found
        status: Any = self.status
        return Evaluation(
            configuration, steps, -math.inf, found.footprint, status=status, reason="nan", replicate=replicate
        )


def test_a_contender_that_fails_with_a_seed_is_out_and_one_that_is_lost_has_fewer(tmp_path: Path) -> None:
    best = search(tmp_path / "sound").best
    failed = search(tmp_path / "failed", evaluator=Fragile(best.configuration, "failed"))
    assert failed.best != best
    assert failed.confirmations[-1].configuration == best.configuration
    assert failed.confirmations[-1].mean == -math.inf
    lost = search(tmp_path / "lost", evaluator=Fragile(best.configuration, "lost"))
    own = next(c for c in lost.confirmations if c.configuration == best.configuration)
    assert len(own.scores) == 3
    assert own.mean == pytest.approx(statistics.fmean(own.scores))


def test_checkpoints_of_contenders_stay_until_the_answer_is_known(tmp_path: Path) -> None:
    off_the_front = {"kept": 0, "deleted": 0}
    for seed in range(5):
        evaluator = Toy(seed)
        result = search(tmp_path / str(seed), evaluator=evaluator, seed=seed)
        gone = {e.checkpoint for e in evaluator.discarded}
        front = {e.configuration for e in (*result.front.evaluations, *result.baselines)}
        fresh = {e.checkpoint for own in result.confirmations for e in own.replicates}
        assert fresh - {result.best.checkpoint} <= gone
        assert result.best.checkpoint not in gone
        for own in result.confirmations:
            kept = own.configuration in front or own.configuration == result.best.configuration
            assert (own.selected.checkpoint in gone) != kept
            if own.configuration not in front:
                off_the_front["kept" if kept else "deleted"] += 1
    assert all(off_the_front.values())


class Seedless(Toy):
    """Knows no seeds, as an evaluator of before there were replicates."""

    @property
    def replicates(self) -> bool:
        return False


def test_an_evaluator_without_seeds_is_refused_before_anything_and_works_without_confirmation(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"confirm needs an evaluator .* 'Seedless' does not; leave it out"):
        search(tmp_path, evaluator=Seedless())
    assert not list(tmp_path.iterdir())
    assert search(tmp_path, evaluator=Seedless(), confirm=None).best.ok
    assert FineTuneEvaluator().replicates
    assert FrozenDivergenceEvaluator().replicates


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"candidates": 0}, "candidates must be a whole number of at least 1, got 0"),
        ({"seeds": 1.5}, "seeds must be a whole number of at least 1, got 1.5"),
        ({"seed": 3}, "confirm is a mapping of candidates and seeds"),
        (True, "confirm is a mapping of candidates and seeds"),
    ],
)
def test_what_cannot_be_confirmed_is_said(given: Any, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        settings(confirm=given)


def test_the_files_of_a_run_tell_mean_interval_seeds_and_the_score_that_selected(tmp_path: Path) -> None:
    result = search(tmp_path, [RunFiles()], references=[[8, 16]])
    confirmed = result.confirmed
    assert confirmed is not None
    run = Run.open(tmp_path)
    entry = run.result.confirmed
    assert entry is not None
    assert (entry.mean, entry.low, entry.high) == (confirmed.mean, confirmed.low, confirmed.high)
    assert [e.score for e in entry.replicates] == list(confirmed.scores)
    assert run.result.best.score == result.best.score >= entry.selected.score == confirmed.selected.score
    assert run.best == result.best
    assert len(run.history) == len(result.history)
    assert [c.over for c in run.result.comparisons] == [c.over for c in result.comparisons]
    with (tmp_path / files.EVALUATIONS).open() as stream:
        rows = list(csv.DictReader(stream))
    fresh = [row for row in rows if row["replicate"] != "0"]
    assert len(fresh) == 4 * len(result.confirmations)
    assert {row["phase"] for row in fresh} == {"confirmation"}
    text = (tmp_path / files.BEST).read_text()
    assert f"# mean score over 4 fresh seeds: {confirmed.mean!r}, 95% interval [" in text
    assert yaml.safe_load(text)["model"]["configuration"] == str(result.best.configuration)
    assert yaml.safe_load(text)["model"].get("replicate", 0) == result.best.replicate
    lines = "\n".join(summary_lines(result))
    assert f"confirmed score: {confirmed.mean:.4f} over 4 fresh seeds, 95% interval [" in lines
    assert f"it was selected by {confirmed.selected.score:.4f}" in lines
    assert lines.count("behind it, ") == len(result.confirmations) - 1
    assert "interval over seeds" in lines
    assert f"over 4 fresh seeds: {confirmed.mean:.4f}" in gain_text(run.result, 4)


def test_one_fresh_seed_has_a_mean_and_no_interval(tmp_path: Path) -> None:
    result = search(tmp_path, [RunFiles()], confirm={"candidates": 2, "seeds": 1})
    confirmed = Run.open(tmp_path).result.confirmed
    assert confirmed is not None
    assert math.isnan(confirmed.low)
    texts = ["\n".join(summary_lines(result)), gain_text(Run.open(tmp_path).result, 4)]
    texts.append((tmp_path / files.BEST).read_text())
    for text in texts:
        assert "fresh seed" in text
        assert "nan" not in next(line for line in text.splitlines() if "fresh seed" in line)


def test_tensorboard_and_the_picture_of_progress_keep_fresh_seeds_apart(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reporter = TensorBoardReporter()
    result = search(tmp_path, [reporter])
    reporter.close()
    events = EventAccumulator(str(tmp_path / files.TENSORBOARD), size_guidance={"scalars": 0})
    events.Reload()
    found = {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert found["confirmed/mean"] == pytest.approx([c.mean for c in result.confirmations])
    assert found["confirmed/selected_by"] == pytest.approx([c.selected.score for c in result.confirmations])
    assert result.confirmed is not None
    assert found["hparam/confirmed_score"] == pytest.approx([result.confirmed.mean])
    fresh = [r.evaluation.score for r in result.records if r.evaluation.replicate]
    assert found["score/at_90_steps_fresh_seeds"] == pytest.approx(fresh)
    assert len(found["score/at_90_steps"]) == len(result.history.at(90))
    axes = progress_figure(result.records, 90).axes[0]
    points = {own.get_label(): len(own.get_offsets()) for own in axes.collections}
    assert points["fresh seeds"] == len(fresh)
    assert points["90 steps"] == len(result.history.at(90))
    best = next(line for line in axes.lines if line.get_label() == "best so far")
    assert max(best.get_ydata()) == max(e.score for e in result.history.at(90))


def test_a_mean_that_is_not_finite_is_read_back_and_shown(tmp_path: Path) -> None:
    best = search(tmp_path / "sound").best
    result = search(tmp_path / "run", [RunFiles()], evaluator=Fragile(best.configuration, "failed"))
    last = Run.open(tmp_path / "run").result.confirmations[-1]
    assert math.isnan(last.mean)
    assert "3 of 4 fresh seeds: nan; it was selected by" in "\n".join(summary_lines(result))


def test_a_result_of_before_there_was_confirmation_is_read(tmp_path: Path) -> None:
    import json

    search(tmp_path, [RunFiles()], confirm=None)
    path = tmp_path / files.RESULT
    document = json.loads(path.read_text())
    del document["confirmations"], document["best"]["replicate"]
    for comparison in document["comparisons"]:
        del comparison["over"]
    path.write_text(json.dumps(document))
    result = Run.open(tmp_path).result
    assert result.confirmed is None
    assert {comparison.over for comparison in result.comparisons} == {"items"}


def test_seeds_of_replicates_are_apart_from_each_other_and_from_other_seeds() -> None:
    assert replicate_seed(7, 0) == 7
    drawn = [replicate_seed(seed, number) for seed in range(50) for number in range(1, 20)]
    assert len({*drawn, *range(50)}) == len(drawn) + 50
    assert replicate_seed(0, 1) == replicate_seed(0, 1)


def test_a_contender_has_one_record_a_seed_in_the_journal(tmp_path: Path) -> None:
    result = search(tmp_path)
    with sqlite3.connect(tmp_path / files.JOURNAL) as database:
        rows = database.execute(
            "SELECT configuration, replicate FROM evaluations WHERE replicate > 0 ORDER BY position"
        ).fetchall()
    database.close()
    # Seed after seed, so that those of one seed, which see the same batches, are trained side by side.
    assert [number for _, number in rows] == sorted(number for _, number in rows)
    assert len(rows) == len(set(rows)) == 4 * len(result.confirmations)
