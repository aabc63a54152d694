"""What a search knows by now, and how long it took to know it."""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

from qratk.core import answer
from qratk.core.configuration import Configuration
from qratk.core.effort import Effort
from qratk.core.evaluation import Candidate, Evaluation, FidelityLadder, History
from qratk.core.pareto import ParetoFront
from qratk.core.problem import Problem
from qratk.core.result import Confirmed, GenerationSummary, Progress, Record, RefinementSummary, SearchPlan
from qratk.core.utility import Utility

Phase = Literal["baseline", "global", "local", "tuning", "confirmation", "reference"]


@dataclass(frozen=True)
class Stage:
    """Where in a search something happens: its phase, and the generation or step within it."""

    phase: Phase
    number: int = 0

    def placed(self, candidate: Candidate) -> Candidate:
        """The candidate, of this stage."""
        return replace(candidate, generation=self.number, phase=self.phase)


class Clock:
    """Seconds since it was made, and those of each stage."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self.stages: defaultdict[str, float] = defaultdict(float)

    @property
    def seconds(self) -> float:
        """Since the clock was made."""
        return time.monotonic() - self._began

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Context whose seconds count for a stage."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.stages[stage] += time.monotonic() - began


class SearchState:
    """What was measured and what it amounts to; it only grows.

    Attributes:
        history: evaluations of the search, in the order of the requests.
        records: the same with their candidates, and those of the references.
        generations: how each generation of phase I ended.
        refinements: how each step of phase II ended.
        best: the answer so far; None before anything that fits was measured at the highest rung.
        single: the best training alone, where `best` is the mean of several.
        discarded: checkpoints that were deleted, by configuration and steps.
        confirmations: what fresh seeds say of the contenders, once they are confirmed; the largest mean first.
        effort: what was trained, without references.
        averages: names of the means of trainings that were scored.

    Args:
        effort: what is trained before the first candidate.
        contenders: how many of the best may be confirmed; none where the answer is not.
        ingredients: how many of the best trainings may be averaged.
    """

    def __init__(
        self,
        problem: Problem,
        ladder: FidelityLadder,
        baselines: Sequence[Configuration],
        alpha: float,
        effort: Effort,
        contenders: int = 0,
        ingredients: int = 0,
    ) -> None:
        self._problem, self._ladder = problem, ladder
        self._baselines = frozenset(baselines)
        self._utility: Utility | float = alpha
        self.history = History()
        self.records: list[Record] = []
        self.generations: list[GenerationSummary] = []
        self.refinements: list[RefinementSummary] = []
        self.best: Evaluation | None = None
        self.single: Evaluation | None = None
        self.discarded: set[tuple[Configuration, int]] = set()
        self.confirmations: tuple[Confirmed, ...] = ()
        self.effort = effort
        self.averages: set[str] = set()
        self._contenders, self._ingredients = contenders, ingredients
        self._measured: Counter[int] = Counter()  # of the history, by rung
        self._recorded: Counter[int] = Counter()  # of the records, by rung
        self._spent = (0.0, 0)  # seconds and steps of what succeeded

    def add(self, record: Record) -> None:
        """Take in a measurement of the search."""
        self.add_reference(record)
        evaluation = record.evaluation
        self.history.append(evaluation)
        self._measured[evaluation.steps] += 1
        if evaluation.steps == self._ladder.highest:
            self._judge()

    def add_reference(self, record: Record) -> None:
        """Take in a measurement that enters no history: of a reference, or with a fresh seed."""
        self.records.append(record)
        evaluation = record.evaluation
        self._recorded[evaluation.steps] += 1
        if record.candidate.phase != "reference":
            self.effort.add(evaluation)
        if evaluation.ok:
            seconds, steps = self._spent
            self._spent = (seconds + evaluation.seconds, steps + evaluation.steps)

    def freeze(self, utility: Utility) -> None:
        """Judge by these ranges of scores and bytes from here on (Eq. 4)."""
        self._utility = utility
        self._judge()

    def contenders(self, most: int | None = None) -> list[Evaluation]:
        """What may be confirmed by now: the best that fit, and behind them the best baseline unless it is one of them.

        None where the answer is not confirmed. `most` leaves out the last of the best, and never the baseline.
        """
        if not self._contenders or most == 0:
            return []
        highest = self._ladder.highest
        leading = answer.ranked(self._problem, self.history, highest, utility=self._utility)
        uniform = max((e for e in leading if e.configuration in self._baselines), key=lambda e: e.score, default=None)
        chosen = leading[: self._contenders if most is None else min(most, self._contenders)]
        if uniform is None or uniform in chosen:
            return chosen
        return [*chosen[: None if most is None else most - 1], uniform]

    def confirm(self, confirmations: Sequence[Confirmed]) -> None:
        """Take in what fresh seeds say; the best is from here on the best by their means, in the best of its trainings.

        Whoever failed with a seed is out. Where nothing could be confirmed the best stays.
        """
        self.confirmations = tuple(sorted(confirmations, key=lambda c: -c.mean if math.isfinite(c.mean) else math.inf))
        means = {c.configuration: c for c in confirmations if math.isfinite(c.mean)}
        best = answer.best(
            self._problem,
            [replace(c.selected, score=c.mean) for c in means.values()],
            self._ladder.highest,
            baselines=self._baselines,
            utility=self._utility,
        )
        if best is not None:
            self.best = means[best.configuration].delivered

    def ingredients(self) -> list[Evaluation]:
        """The trainings that may be averaged into the answer's, the best score first, replicates among them."""
        highest = self._ladder.highest
        trained: dict[tuple[str, int], Evaluation] = {}
        searched = (r.evaluation for r in self.records if r.candidate.phase != "reference")
        able = (e for e in searched if e.steps == highest and e.ok and e.checkpoint is not None)
        for evaluation in sorted(able, key=lambda e: -e.score):
            trained.setdefault((evaluation.training, evaluation.replicate), evaluation)
        return list(trained.values())[: self._ingredients]

    def take_merged(self, evaluation: Evaluation) -> None:
        """The mean of several trainings is the answer's adapter from here on."""
        self.single, self.best = self.best, evaluation

    def _judge(self) -> None:
        self.best = answer.best(
            self._problem, self.history, self._ladder.highest, baselines=self._baselines, utility=self._utility
        )

    def measured(self, steps: int) -> int:
        """How many evaluations of the search there are at a rung, failed ones included."""
        return self._measured[steps]

    def fitting(self, steps: int) -> list[Evaluation]:
        """What was measured at a rung and fits the budget."""
        return answer.fitting(self._problem, self.history, steps)

    def front(self, steps: int) -> ParetoFront:
        """Front of what was measured at a rung."""
        return answer.front(self._problem, self.history, steps)

    def progress(self, plan: SearchPlan, stage: Stage, rung: int, clock: Clock, workers: int = 1) -> Progress:
        """Where the search stands at a rung; the seconds left are from the rate so far, shared by all workers."""
        left = sum(steps * max(0, count - self._recorded[steps]) for steps, count in plan.evaluations.items())
        seconds, steps_done = self._spent
        return Progress(
            phase=stage.phase,
            generation=stage.number,
            rung=rung,
            done=len(self.records),
            planned=sum(plan.evaluations.values()),
            best=self.best,
            seconds=clock.seconds,
            seconds_left=seconds / steps_done * left / workers if steps_done else None,
        )
