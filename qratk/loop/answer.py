"""What a search ended with: the best, what it is compared with, scores on test data."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from qratk.core.configuration import Configuration
from qratk.core.errors import RunDirectoryError
from qratk.core.evaluation import Candidate, Evaluation, mean_of, scored_as
from qratk.core.result import Comparison, Confirmed, SearchResult
from qratk.core.utility import Utility
from qratk.core.work import counted
from qratk.evaluators.base import Evaluator
from qratk.executors.base import Executor
from qratk.loop.measuring import Measuring
from qratk.loop.racing import group, race
from qratk.loop.settings import SearchSettings
from qratk.loop.state import Clock, SearchState, Stage
from qratk.loop.statistics import paired_comparison, seed_comparison, top3_hit_rates
from qratk.mutations.proposer import ProposalCounts
from qratk.run import files
from qratk.run.journal import Journal


def conclude(
    settings: SearchSettings,
    measuring: Measuring,
    *,
    utility: Utility,
    proposals: ProposalCounts,
    stop_reasons: dict[str, str],
    tests: bool,
) -> SearchResult:
    """The result of a search; references are measured and test data scored only here, after the last decision.

    `tests`: whether test data are scored.
    """
    plan, state, evaluator = measuring.plan, measuring.state, measuring.evaluator
    highest = plan.ladder.highest
    best = state.best
    assert best is not None, "a search in which nothing was measured has no answer"
    space = plan.problem.space
    tried = space.spread_shared if settings.spreads_baselines else space.all_shared
    groups = [group(c, tried) for c in _references(settings, plan.problem.num_layers)]
    *_, references = race(groups, settings.reference_race, settings, measuring, Stage("reference"))
    baselines = [e for e in (state.history.get(c, highest) for c in plan.baselines) if e is not None]
    weights = evaluator.item_weights
    alone = () if state.single is None else (state.single,)
    others = () if settings.test == "answer" else (*baselines, *references, *alone)
    scores = [*others, best] if tests else []  # of one configuration the last counts
    return SearchResult(
        plan=plan,
        best=best,
        item_weights=None if weights is None else tuple(weights),
        front=state.front(highest),
        baselines=tuple(baselines),
        references=tuple(references),
        comparisons=tuple(_compared(best, e, state.confirmations, weights) for e in (*baselines, *references)),
        history=state.history,
        records=tuple(state.records),
        generations=tuple(state.generations),
        refinements=tuple(state.refinements),
        stop_reasons=stop_reasons,
        utility=utility,
        test_scores=_tested(scores, measuring.executor, measuring.journal, measuring.clock),
        proposals=asdict(proposals),
        top3_hit_rates=_hit_rates(settings, state, measuring),
        seconds=_spent(state, measuring.clock),
        confirmations=state.confirmations,
        single=state.single,
        averages=len(state.averages),
    )


def keep_adapter(evaluator: Evaluator, best: Evaluation, run_dir: Path) -> None:
    """Write the adapter that the best was scored with into the run folder, whole or not at all, over a former one.

    Raises `RunDirectoryError` when it cannot be written.
    """
    folder = run_dir / files.ADAPTER
    part = folder.with_name(f".{folder.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        if evaluator.save_adapter(best, part):
            shutil.rmtree(folder, ignore_errors=True)
            part.rename(folder)
    except OSError as error:
        raise RunDirectoryError(
            f"cannot write {folder}: {error}. Free some space, then run the same command to go on; what was measured "
            "before is kept."
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _compared(
    best: Evaluation, baseline: Evaluation, confirmations: Sequence[Confirmed], weights: Sequence[float] | None
) -> Comparison:
    """The best against a baseline: by the seeds that both were confirmed with, or else by the items."""
    found = {c.selected.configuration: c for c in confirmations}
    ours, theirs = found.get(best.configuration), found.get(baseline.configuration)
    by_seed = None if ours is None or theirs is None else seed_comparison(ours, theirs)
    return by_seed or paired_comparison(best, baseline, weights=weights)


def _references(settings: SearchSettings, layers: int) -> list[Candidate]:
    """Uniform configurations outside the search."""
    uniform = [Configuration((choice,) * layers) for choice in settings.reference_choices]
    return [Candidate(configuration, "reference", phase="reference") for configuration in uniform]


def _tested(
    evaluations: Sequence[Evaluation], executor: Executor, journal: Journal, clock: Clock
) -> dict[str, dict[str, float]]:
    """Scores on test data by the text that `scored_as` gives, of what succeeded."""
    wanted = {scored_as(e.configuration, e.merged): e for e in evaluations if e.ok}
    if not wanted:
        return {}
    lacking = [e for e in wanted.values() if journal.decision(_test_of(e)) is None]
    with clock.timed("test"):
        for evaluation, scores in counted("scoring on test data", executor.tested(lacking), len(lacking)):
            journal.decide(_test_of(evaluation), scores)
    return {text: journal.decision(_test_of(e)) for text, e in wanted.items()}


def _test_of(evaluation: Evaluation) -> str:
    """Name of the decision that holds its test scores: a training with fresh seeds has its own."""
    fresh = f"/replicate-{evaluation.replicate}" if evaluation.replicate else ""
    several = f"/{mean_of(evaluation.merged)}" if evaluation.merged else ""
    return f"test/{evaluation.configuration}{fresh}{several}"


def _hit_rates(settings: SearchSettings, state: SearchState, measuring: Measuring) -> dict[str, float]:
    ladder, problem = settings.ladder, measuring.plan.problem
    if ladder.lowest == ladder.highest:
        return {}
    with measuring.clock.timed("strategy"):
        return top3_hit_rates(settings.surrogate, problem, state.history, low=ladder.lowest, high=ladder.highest)


def _spent(state: SearchState, clock: Clock) -> dict[str, float]:
    """Seconds by stage and in all. Evaluations count those of interrupted runs too, the other stages do not."""
    stages = {"evaluation": sum(record.evaluation.seconds for record in state.records), **clock.stages}
    return {**stages, "total": sum(stages.values())}
