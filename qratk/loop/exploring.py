"""Phase I: generation after generation of the global searcher, each a race up the rungs."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import final

import numpy as np

from qratk.core.evaluation import Candidate, Evaluation, History, Request
from qratk.core.result import GenerationSummary
from qratk.core.space import SearchSpace
from qratk.evaluators.base import EvaluationContext
from qratk.loop.asking import Asking
from qratk.loop.measuring import Measuring
from qratk.loop.promotion import Promotion, Trust, going, promote
from qratk.loop.purse import Purse
from qratk.loop.racing import group, leading, race
from qratk.loop.settings import Schedule, SearchSettings
from qratk.loop.state import SearchState, Stage
from qratk.loop.stopping import enough, room
from qratk.mutations.proposer import Proposer


@final
@dataclass(frozen=True)
class Exploring:
    """Has the searcher propose and the candidates race, until it is over."""

    settings: SearchSettings
    context: EvaluationContext
    proposer: Proposer
    measuring: Measuring
    asking: Asking
    purse: Purse

    @property
    def _state(self) -> SearchState:
        return self.measuring.state

    def run(self) -> str:
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
            requests = requests[: self._affordable([r.candidate for r in requests])]
            if not requests:
                return self.purse.spent
            schedule = settings.race(len(requests))
            candidates, tuning = self._tuned([r.candidate for r in requests], schedule[0][0], stage)
            measured, trust = self._race(candidates, schedule, stage)
            searcher.tell(list({(e.configuration, e.steps): e for e in (*tuning, *measured)}.values()))
            self._summarise(number, trust, time.monotonic() - began)
            if settings.promotion == "each":  # else any of them may still go on
                self.measuring.prune()
            if reason := enough(settings, self._state):
                return reason
        return (
            f"the cap of {settings.generations} generations" if settings.generations else "no generation was asked for"
        )

    def _ask_searcher(self, stage: Stage, rng: np.random.Generator) -> tuple[Request, ...]:
        candidates = self.settings.searcher.ask(self._history, rng)
        if not candidates:
            return ()
        (first, _), *_ = self.settings.race(len(candidates))
        return tuple(Request(stage.placed(candidate), first) for candidate in candidates)

    def promote_last(self) -> None:
        """The one race after phase I: the best of all generations go up the ladder."""
        lowest = self.settings.ladder.lowest
        records = self._state.records
        ran = [r.candidate for r in records if r.candidate.phase == "global" and r.evaluation.steps == lowest]
        _, *higher = self.settings.last_race
        for most in range(max(size for _, size in self.settings.last_race), 0, -1):
            schedule = ((lowest, len(ran)), *((steps, min(size, most)) for steps, size in higher))
            if self._price_above(schedule) <= self.purse.left_to_search:
                self._race(ran, schedule, Stage("global"))
                return

    @property
    def _history(self) -> History:
        """What the searcher hears of: where it knows no shared settings, what was measured without."""
        if not self.settings.tuned_above:
            return self._state.history
        return History(e for e in self._state.history if not e.configuration.shared)

    def _affordable(self, candidates: Sequence[Candidate]) -> int:
        """How many of the candidates can be raced with what is left to train."""
        if not self.purse.limited:
            return len(candidates)
        left = self.purse.left_to_search
        if self.settings.promotion == "last":
            left -= min(self._price_above(self.settings.last_race), left / 2)
        sizes = range(len(candidates), 0, -1)
        return next((size for size in sizes if self._price(candidates[:size]) <= left), 0)

    def _price(self, candidates: Sequence[Candidate]) -> int:
        """The most that a generation of these takes."""
        schedule, space = self.settings.race(len(candidates)), self._space
        (first, _), *_ = schedule
        if self.settings.tuned_above and first != self.settings.untrained:
            return schedule[-1][1] * self.purse.of_tuning()
        above = self._price_above(schedule)
        if self._tuned_before(candidates):
            tuning = tuple((steps, size) for steps, size in self.settings.settings_race if steps <= first)
            return above + self.purse.of_race([group(c, space.all_shared) for c in candidates], tuning)
        trainings = self.purse.trainings(candidate.configuration for candidate in candidates)
        most = self._price_above(schedule, len(trainings))
        return most + self._state.effort.lacking(trainings, first)

    def _price_above(self, schedule: Schedule, most: float = math.inf) -> int:
        """The most that the rungs above the first take, of at most so many trainings."""
        if self.settings.tuned_above:
            return schedule[-1][1] * self.purse.of_tuning() if len(schedule) > 1 else 0
        return self.purse.of_rungs(schedule, most=most)

    @property
    def _space(self) -> SearchSpace:
        return self.measuring.plan.problem.space

    def _tuned_before(self, candidates: Sequence[Candidate]) -> bool:
        """Whether candidates without shared settings get the best of these before they race."""
        bare = any(not candidate.configuration.shared for candidate in candidates)
        return bool(self._space.shared) and bare and not self.settings.tuned_above

    def _tuned(
        self, candidates: Sequence[Candidate], first: int, stage: Stage
    ) -> tuple[Sequence[Candidate], list[Evaluation]]:
        """The candidates, those without shared settings with the best of all combinations, and what that measured.

        They race up to the rung `first`, where the race of the candidates begins.
        """
        if not self._tuned_before(candidates):
            return candidates, []
        groups = [group(candidate, self._space.all_shared) for candidate in candidates]
        schedule = tuple((steps, size) for steps, size in self.settings.settings_race if steps <= first)
        rungs = race(groups, schedule, self.settings, self.measuring, stage)
        winners = {c.configuration: c for members in groups for c in leading(members, 1, rungs[-1])}
        return tuple(winners.values()), [evaluation for rung in rungs for evaluation in rung]

    def _race(
        self, candidates: Sequence[Candidate], schedule: Schedule, stage: Stage
    ) -> tuple[list[Evaluation], Trust]:
        """All that was measured of the candidates: each rung continues the most promising of the rung below.

        Where the lowest rung knows no shared settings, those that would reach T_S go up with all of them at once.
        """
        if self.settings.tuned_above:
            return self._race_and_tune(candidates, schedule, stage)
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

    def _race_and_tune(
        self, candidates: Sequence[Candidate], schedule: Schedule, stage: Stage
    ) -> tuple[list[Evaluation], Trust]:
        """All that was measured without settings; of the best every combination races up the rungs above."""
        running, measured, trust = list(candidates), list[Evaluation](), Trust()
        (first, _), *higher = schedule
        if first == self.settings.untrained:
            measured = self.measuring.measure([Request(candidate, first) for candidate in running], stage)
            if not higher:
                return measured, trust
            decision = self._promotion(running, first, schedule[-1][1], stage)
            running, trust = going(decision, running), trust.after(decision)
        groups = [group(candidate, self._space.all_shared) for candidate in running]
        race(groups, self.settings.settings_race, self.settings, self.measuring, stage)
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
        limit = self.proposer.problem.budget.limit_bytes
        volume = front.hypervolume(self._reference_corner(), limit) if len(front) else 0.0
        before = state.generations[-1].hypervolume if state.generations else 0.0
        growth = (volume - before) / (before + 1e-12) if state.generations else math.inf
        summary = GenerationSummary(number, front, volume, growth, state.best, trust.quality, trust.used, seconds)
        state.generations.append(summary)
        self.measuring.reporter.generation(summary)

    def _reference_corner(self) -> tuple[float, float]:
        """Corner of the hypervolume, fixed once anything is measured: a tenth beyond the worst score and the budget."""

        def fix() -> list[float]:
            scores = [e.score for e in self._state.fitting(self.settings.judged_at)]
            return [-(min(scores) - 0.1 * ((max(scores) - min(scores)) or 1.0)), 1.1]

        corner = self.measuring.journal.decided("hypervolume reference", fix)
        return corner[0], corner[1]
