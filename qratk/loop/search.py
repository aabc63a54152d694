"""The search, told once: settings, problem, state; baselines; ask, race, tell, until it is over; the answer."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np

from qratk.core.errors import SearchError
from qratk.core.evaluation import Candidate, Evaluation, Request
from qratk.core.memory import format_bytes
from qratk.core.problem import Importance, Problem
from qratk.core.result import GenerationSummary, RefinementSummary, SearchPlan, SearchResult
from qratk.core.utility import Utility
from qratk.core.work import listening
from qratk.evaluators.base import EvaluationContext
from qratk.executors.base import Blueprint
from qratk.loop.answer import conclude
from qratk.loop.asking import Asking
from qratk.loop.measuring import Measuring, of_the_machine
from qratk.loop.promotion import Promotion, Trust, going, promote
from qratk.loop.settings import Schedule, SearchSettings
from qratk.loop.state import Clock, SearchState, Stage
from qratk.loop.stopping import cap_reached, enough, room
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

        Raises `RunDirectoryError`, `InfeasibleBudgetError`, or `SearchError` when nothing could be measured.
        """
        with Journal(run_dir) as journal, listening(reporter.working):
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
        tests = settings.test and evaluator.prepare_test()
    if settings.test and not tests:
        reporter.message("There are no test data: the answer will be without test scores.")
    if lost := journal.withdraw(of_the_machine):
        reporter.message(
            f"{len(lost)} evaluations failed for want of memory or by another fault of the machine, as "
            f"{lost[0].evaluation.configuration} ({lost[0].evaluation.reason}): they are tried again."
        )
    problem = _pose(settings, journal, reporter, clock)
    settings.executor.begin(problem.space)
    fitting = [c for c in problem.space.uniforms() if problem.feasible(c)]
    baselines = tuple(fitting if settings.uniform_baselines else ())
    planned = settings.planned_evaluations(len(baselines))
    plan = SearchPlan(settings.name, problem, settings.ladder, planned, baselines, len(journal))
    reporter.started(plan)
    proposer = Proposer(problem, settings.mutations, settings.repair)
    state = SearchState(problem, settings.ladder, baselines, settings.alpha)
    measuring = Measuring(evaluator, settings.executor, journal, reporter, plan, state, clock)
    phases = _Phases(settings, context, proposer, measuring, Asking(journal, proposer, clock))
    phases.measure_baselines()
    stop_reasons = {"global": phases.explore()}
    if settings.promotion == "last":
        phases.promote_last()
    utility = phases.freeze_utility()
    stop_reasons["local"] = phases.refine(utility)
    result = conclude(
        settings, measuring, utility=utility, proposals=proposer.counts, stop_reasons=stop_reasons, tests=tests
    )
    reporter.finished(result)
    return result


def _pose(settings: SearchSettings, journal: Journal, reporter: Reporter, clock: Clock) -> Problem:
    evaluator = settings.evaluator
    memory, budget = settings.pose([shape.name for shape in evaluator.shapes], evaluator.memory_model)
    if not budget.check(memory):
        reporter.message(
            f"The budget of {format_bytes(budget.limit_bytes)} never binds: the largest configuration takes "
            f"{format_bytes(memory.bytes(memory.space.largest, budget.scope))}."
        )

    def estimate() -> dict[str, list[float]]:
        with clock.timed("importance"):
            bits = evaluator.importance(settings.bits_importance, memory.space)
            rank = evaluator.importance(settings.rank_importance, memory.space)
        return {"bits": bits.tolist(), "rank": rank.tolist()}

    scores = journal.decided("importance", estimate)
    return Problem(evaluator.shapes, memory, budget, Importance(tuple(scores["bits"]), tuple(scores["rank"])))


@dataclass(frozen=True)
class _Phases:
    """The phases of one search, over its state."""

    settings: SearchSettings
    context: EvaluationContext
    proposer: Proposer
    measuring: Measuring
    asking: Asking

    @property
    def _state(self) -> SearchState:
        return self.measuring.state

    def measure_baselines(self) -> None:
        """Uniform configurations that fit, on every rung: the promise never to be worse, and the first pairs."""
        candidates = [Candidate(c, "uniform", phase="baseline") for c in self.measuring.plan.baselines]
        for steps in self.settings.ladder.steps:
            going_on = candidates[: room(self.settings, self._state, steps)]
            self.measuring.measure([Request(candidate, steps) for candidate in going_on], Stage("baseline"))

    # Phase I

    def explore(self) -> str:
        """Generation after generation; says why that ended."""
        settings, searcher = self.settings, self.settings.searcher
        rng = np.random.default_rng([settings.seed, 1])
        searcher.attach(self.context)
        searcher.begin(self.proposer, settings.ladder)
        for number in range(1, settings.generations + 1):
            began, stage = time.monotonic(), Stage("global", number)
            requests = self.asking.asked(f"generation/{number}", searcher, rng, partial(self._ask_searcher, stage))
            if not requests:
                return "nothing new could be proposed"
            measured, trust = self._race([r.candidate for r in requests], settings.race(len(requests)), stage)
            searcher.tell(measured)
            self._summarise(number, trust, time.monotonic() - began)
            if settings.promotion == "each":  # else any of them may still go on
                self._prune()
            if reason := enough(settings, self._state):
                return reason
        return (
            f"the cap of {settings.generations} generations" if settings.generations else "no generation was asked for"
        )

    def _ask_searcher(self, stage: Stage, rng: np.random.Generator) -> tuple[Request, ...]:
        candidates = self.settings.searcher.ask(self._state.history, rng)
        if not candidates:
            return ()
        (first, _), *_ = self.settings.race(len(candidates))
        return tuple(Request(_placed(candidate, stage), first) for candidate in candidates)

    def promote_last(self) -> None:
        """The one race after phase I: the best of all generations go up the ladder."""
        lowest = self.settings.ladder.lowest
        records = self._state.records
        ran = [r.candidate for r in records if r.candidate.phase == "global" and r.evaluation.steps == lowest]
        _, *higher = self.settings.last_race
        self._race(ran, ((lowest, len(ran)), *higher), Stage("global"))

    def _race(
        self, candidates: Sequence[Candidate], schedule: Schedule, stage: Stage
    ) -> tuple[list[Evaluation], Trust]:
        """All that was measured of the candidates: each rung continues the most promising of the rung below."""
        running, measured, below, trust = list(candidates), list[Evaluation](), 0, Trust()
        for steps, size in schedule:
            left = room(self.settings, self._state, steps)
            if below:
                decision = self._promotion(running, below, size if left is None else min(size, left), stage)
                running, trust = going(decision, running), trust.after(decision)
            else:
                running = running[:left]
            measured += self.measuring.measure([Request(candidate, steps) for candidate in running], stage)
            below = steps
        return measured, trust

    def _promotion(self, candidates: Sequence[Candidate], low: int, size: int, stage: Stage) -> Promotion:
        state, problem, clock = self._state, self.proposer.problem, self.measuring.clock

        def decide() -> Promotion:
            with clock.timed("strategy"):
                return promote(self.settings, problem, state.history, candidates, low, size)

        decision: Promotion = self.measuring.journal.decided(f"promotion/{stage.number}/{low}", decide)
        return decision

    def _summarise(self, number: int, trust: Trust, seconds: float) -> None:
        state = self._state
        front = state.front(self.settings.judged_at)
        volume = front.hypervolume(self._reference_corner(), self.proposer.problem.budget.limit_bytes)
        before = state.generations[-1].hypervolume if state.generations else 0.0
        growth = (volume - before) / (before + 1e-12) if state.generations else math.inf
        summary = GenerationSummary(number, front, volume, growth, state.best, trust.quality, trust.used, seconds)
        state.generations.append(summary)
        self.measuring.reporter.generation(summary)

    def _reference_corner(self) -> tuple[float, float]:
        """Corner of the hypervolume, fixed after generation 1: a tenth beyond the worst score and the budget."""

        def fix() -> list[float]:
            scores = [e.score for e in self._state.fitting(self.settings.judged_at)]
            if not scores:
                return [math.inf, 1.1]
            return [-(min(scores) - 0.1 * ((max(scores) - min(scores)) or 1.0)), 1.1]

        corner = self.measuring.journal.decided("hypervolume reference", fix)
        return corner[0], corner[1]

    # Phase II

    def freeze_utility(self) -> Utility:
        """The utility that phase II and the answer go by, its ranges those of what was measured at T_S by now."""
        measured = self._state.fitting(self.settings.ladder.highest)
        if not measured:
            raise SearchError(_nothing_measured(self.settings, self._state))
        utility = Utility.over(measured, alpha=self.settings.alpha, scope=self.settings.scope)
        self._state.freeze(utility)
        return utility

    def refine(self, utility: Utility) -> str:
        """Step after step of the refiner; says why that ended."""
        settings, refiner, state = self.settings, self.settings.refiner, self._state
        rng = np.random.default_rng([settings.seed, 2])
        refiner.begin(self.proposer, settings.ladder, utility, state.history)
        reason = self._refine(rng)
        self._prune()
        return reason

    def _refine(self, rng: np.random.Generator) -> str:
        refiner, state = self.settings.refiner, self._state
        while not refiner.finished:
            if reason := cap_reached(self.settings, state):
                return reason
            began, before = time.monotonic(), state.best
            stage = Stage("local", len(state.refinements) + 1)
            requests = self.asking.asked(f"refinement/{stage.number}", refiner, rng, partial(self._ask_refiner, stage))
            if not requests:
                return refiner.stop_reason or "nothing new could be proposed"
            refiner.tell(self.measuring.measure(requests, stage))
            improved = state.best is not before
            seconds = time.monotonic() - began
            summary = RefinementSummary(stage.number, state.best, improved, refiner.diagnostics, seconds)
            state.refinements.append(summary)
            self.measuring.reporter.refinement(summary)
        return refiner.stop_reason

    def _ask_refiner(self, stage: Stage, rng: np.random.Generator) -> tuple[Request, ...]:
        requests = self.settings.refiner.ask(self._state.history, rng)
        return tuple(replace(request, candidate=_placed(request.candidate, stage)) for request in requests)

    def _prune(self) -> None:
        """Delete checkpoints that nothing will continue or report."""
        state, highest = self._state, self.settings.ladder.highest
        kept = {e.configuration for e in state.front(highest).evaluations} | set(self.measuring.plan.baselines)
        kept |= {state.best.configuration} if state.best else set()
        for evaluation in state.history:
            key = (evaluation.configuration, evaluation.steps)
            needed = evaluation.steps == highest and evaluation.configuration in kept
            if evaluation.checkpoint and not needed and key not in state.discarded:
                self.settings.evaluator.discard(evaluation)
                state.discarded.add(key)


def _placed(candidate: Candidate, stage: Stage) -> Candidate:
    return replace(candidate, generation=stage.number, phase=stage.phase)


def _nothing_measured(settings: SearchSettings, state: SearchState) -> str:
    reasons = Counter(e.reason for e in state.history if not e.ok).most_common(1)
    why = f"; most often: {reasons[0][0]}" if reasons else ""
    return (
        f"no configuration could be measured at {settings.ladder.highest} steps{why}. "
        "See evaluations.csv for every reason; a smaller learning rate or batch size is the usual cure."
    )
