"""The search, told once: settings, problem, state; baselines; ask, race, tell, until it is over; the answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from qratk.core.errors import ConfigurationError, SearchError
from qratk.core.evaluation import Candidate
from qratk.core.memory import format_bytes
from qratk.core.problem import Importance, Problem
from qratk.core.result import SearchPlan, SearchResult
from qratk.core.space import SearchSpace
from qratk.core.utility import Utility
from qratk.core.work import listening
from qratk.evaluators.base import EvaluationContext
from qratk.executors.base import Blueprint
from qratk.loop.answer import conclude, keep_adapter
from qratk.loop.asking import Asking
from qratk.loop.confirming import confirm
from qratk.loop.exploring import Exploring
from qratk.loop.measuring import Measuring, of_the_machine
from qratk.loop.merging import merge
from qratk.loop.purse import Purse
from qratk.loop.racing import Group, group, race, spread_race
from qratk.loop.refining import Refining
from qratk.loop.settings import SearchSettings
from qratk.loop.spending import Spending
from qratk.loop.state import Clock, SearchState, Stage
from qratk.mutations.proposer import Proposer
from qratk.reporters.base import Reporter
from qratk.run.journal import Comparable, Journal

if TYPE_CHECKING:
    from lightning import Trainer

    from qratk.data.base import TaskData
    from qratk.training.module import FineTuneModule


@final
@dataclass(frozen=True, kw_only=True)
class SearchLoop(SearchSettings):
    """Searches bits and ranks of every layer under a budget."""

    def run(
        self,
        *,
        run_dir: Path,
        reporter: Reporter,
        config: Mapping[str, Any],
        comparable: Comparable = dict,
        module: FineTuneModule | None = None,
        datamodule: TaskData | None = None,
        trainer: Callable[..., Trainer] | None = None,
        blueprint: Blueprint | None = None,
    ) -> SearchResult:
        """What the search found; every measurement is in `run_dir` before the next begins.

        Args:
            run_dir: a new directory, or that of an interrupted search with the same `config`, which is resumed.
            reporter: is told what happens.
            config: plain data that decides the outcome; a run directory is resumed only on an equal one.
            comparable: the form in which settings by dotted key, stored and given, are compared.
            module, datamodule, trainer: handed on to the evaluator.
            blueprint: rebuilds evaluator, module, data and trainer in other processes, for executors that have some.

        Raises `ConfigurationError` for what `client` could not serve, `RunDirectoryError`, `InfeasibleBudgetError`, or
        `SearchError` when nothing could be measured.
        """
        served = self.require_served(module)
        with Journal(run_dir) as journal, listening(reporter.working):
            for line in served:
                reporter.message(line)
            journal.bind("config", config, comparable=comparable)
            context = EvaluationContext(
                run_dir,
                self.ladder,
                self.seed,
                module,
                datamodule,
                trainer,
                reference_bits=tuple(sorted({choice.bits for choice in self.reference_choices} - set(self.bits))),
                reference_ranks=tuple(sorted({choice.rank for choice in self.reference_choices})),
                say=reporter.message,
                decided=journal.decided,
                recorded=journal.decision,
                workers=self.executor.workers,
                measured=lambda: (record.evaluation for record in journal.records),
            )
            with closing(self.executor):
                try:
                    return _search(self, journal, reporter, context, blueprint)
                except SystemExit as stop:
                    if stop.code not in (None, 0):
                        raise
                    raise SearchError(
                        f"a part of the search ended it with {type(stop).__name__}, before there was a result; run it "
                        "again to go on, and report that to whoever made the part"
                    ) from stop


def _search(
    settings: SearchSettings,
    journal: Journal,
    reporter: Reporter,
    context: EvaluationContext,
    blueprint: Blueprint | None,
) -> SearchResult:
    clock, evaluator = Clock(), settings.evaluator
    with clock.timed("setup"):
        settings.executor.open(evaluator, context, blueprint)
        journal.bind("content", evaluator.fingerprint())
        tests = bool(settings.test) and evaluator.prepare_test()
    if settings.test and not tests:
        reporter.message("There are no test data: the answer will be without test scores.")
    if lost := journal.withdraw(of_the_machine):
        reporter.message(
            f"{len(lost)} evaluations failed for want of memory or by another fault of the machine, as "
            f"{lost[0].evaluation.configuration} ({lost[0].evaluation.reason}): they are tried again."
        )
    problem = _pose(settings, journal, reporter, clock)
    settings.executor.begin(problem.space)
    fitting = settings.baselines([c for c in problem.space.uniforms() if problem.feasible(c)])
    uniform = [Candidate(c.with_shared(()), "uniform", phase="baseline") for c in fitting]
    groups = [group(c, problem.space.all_shared) for c in uniform]
    baselines = tuple(candidate.configuration for members in groups for candidate in members)
    planned = settings.planned_evaluations(len(groups))
    plan = SearchPlan(
        settings.name,
        problem,
        settings.ladder,
        planned,
        baselines,
        resumed=len(journal),
        proxy=evaluator.proxy if settings.untrained is not None else "",
        shared_runs=evaluator.shared_runs,
    )
    reporter.started(plan)
    proposer = Proposer(problem, settings.operators, settings.repair)
    state = SearchState(
        problem,
        settings.ladder,
        baselines,
        settings.alpha,
        plan.effort,
        settings.contenders,
        ingredients=settings.merge if evaluator.merges else 0,
    )
    measuring = Measuring(evaluator, settings.executor, journal, reporter, plan, state, clock)
    asking, purse = Asking(journal, proposer, clock), Purse(settings, measuring)
    _require_affordable(groups, settings, purse)
    # The promise never to be worse, and the first pairs.
    if groups and settings.spreads_baselines:
        spread_race(groups, settings, measuring, Stage("baseline"))
    else:
        race(groups, settings.settings_race, settings, measuring, Stage("baseline"))
    exploring = Exploring(settings, context, _searched(proposer, settings), measuring, asking, purse)
    stop_reasons = {"global": exploring.run()}
    if settings.promotion == "last":
        exploring.promote_last()
    utility = _frozen_utility(settings, state)
    stop_reasons["local"] = Refining(settings, proposer, measuring, asking, purse).run(utility)
    if purse.limited:
        Spending(settings, measuring, purse).run()
    confirm(settings, measuring, purse)
    merge(settings, measuring)
    if purse.limited:
        stop_reasons["budget"] = f"{state.effort.full_runs:.2f} of {settings.full_runs:g} full runs are trained"
    measuring.prune(over=True)
    result = conclude(
        settings, measuring, utility=utility, proposals=proposer.counts, stop_reasons=stop_reasons, tests=tests
    )
    keep_adapter(evaluator, result.best, context.run_dir)
    reporter.finished(result)
    return result


def _searched(proposer: Proposer, settings: SearchSettings) -> Proposer:
    """The proposer of the global searcher: without shared settings where its lowest rung cannot tell them apart."""
    if not settings.tuned_above:
        return proposer
    memory = proposer.problem.memory
    bare = replace(proposer.problem, memory=replace(memory, space=replace(memory.space, shared=())))
    return Proposer(bare, settings.operators, settings.repair, counts=proposer.counts)


def _require_affordable(groups: Sequence[Group], settings: SearchSettings, purse: Purse) -> None:
    """Raise `ConfigurationError` where the baselines alone exceed the budget of full runs."""
    if not groups or not purse.limited:
        return
    price, left = _price_of_baselines(groups, settings, purse), purse.left_to_search
    if price > left:
        highest = settings.ladder.highest
        raise ConfigurationError(
            f"full_runs is {settings.full_runs:g}, which leaves {left / highest:.1f} to search by, and the uniform "
            f"baselines alone ({len(groups)}) take {price / highest:.1f}; raise it, or leave them out "
            "(uniform_baselines: false)"
        )


def _price_of_baselines(groups: Sequence[Group], settings: SearchSettings, purse: Purse) -> int:
    """The most steps that the baselines take; of those that share a training one is counted."""
    if not settings.spreads_baselines:
        return purse.of_race(groups, settings.settings_race)
    trainings = len(purse.trainings(members[0].configuration for members in groups))
    (lowest, size), *_ = schedule = settings.baseline_race(trainings)
    return lowest * size + purse.of_rungs(schedule)


def _pose(settings: SearchSettings, journal: Journal, reporter: Reporter, clock: Clock) -> Problem:
    evaluator = settings.evaluator
    memory, budget = settings.pose([shape.name for shape in evaluator.shapes], evaluator.memory_model)
    if not budget.check(memory):
        reporter.message(
            f"The budget of {format_bytes(budget.limit_bytes)} never binds: the largest configuration takes "
            f"{format_bytes(memory.bytes(memory.space.largest, budget.scope))}."
        )

    def estimate() -> dict[str, Any]:
        with clock.timed("importance"):
            return _estimated(settings, memory.space)

    found = journal.decided("importance", estimate)
    costs, gains = (None if key not in found else tuple(map(tuple, found[key])) for key in ("costs", "gains"))
    importance = Importance(tuple(found["bits"]), tuple(found["rank"]), costs, gains)
    return Problem(evaluator.shapes, memory, budget, importance)


def _estimated(settings: SearchSettings, space: SearchSpace) -> dict[str, Any]:
    """Scores of the layers for bits and ranks, and what each rung costs or brings where an estimator knows."""
    evaluator, found = settings.evaluator, dict[str, Any]()
    costs = evaluator.importance_by_rung(settings.bits_importance, space, "bits")
    gains = evaluator.importance_by_rung(settings.rank_importance, space, "rank")
    scored = [
        estimator
        for estimator, table in ((settings.bits_importance, costs), (settings.rank_importance, gains))
        if table is None
    ]
    scores = iter(evaluator.importances(scored, space) if scored else ())
    bits = next(scores) if costs is None else costs[:, 0]
    rank = next(scores) if gains is None else gains[:, -1]
    found |= {"bits": bits.tolist(), "rank": rank.tolist()}
    found |= {key: table.tolist() for key, table in (("costs", costs), ("gains", gains)) if table is not None}
    return found


def _frozen_utility(settings: SearchSettings, state: SearchState) -> Utility:
    """The utility that phase II and the answer go by, its ranges those of what was measured at T_S by now."""
    highest = settings.ladder.highest
    measured = state.fitting(highest)
    if not measured:
        reasons = Counter(e.reason for e in state.history if not e.ok).most_common(1)
        why = f"; most often: {reasons[0][0]}" if reasons else ""
        if not reasons and settings.full_runs is not None:
            raise SearchError(
                f"nothing reached {highest} steps within {settings.full_runs:g} full runs; raise full_runs"
                + (f", of which confirm takes {settings.planned_replicates}" if settings.confirm else "")
            )
        raise SearchError(
            f"no configuration could be measured at {highest} steps{why}. "
            "See evaluations.csv for every reason; a smaller learning rate or batch size is the usual cure."
        )
    utility = Utility.over(measured, alpha=settings.alpha, scope=settings.scope)
    state.freeze(utility)
    return utility
