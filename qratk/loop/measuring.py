"""Measuring what is asked for: history and journal first, then the executor; the one way into the state."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import dropwhile

from qratk.core.evaluation import Evaluation, Request
from qratk.core.result import Progress, Record, SearchPlan
from qratk.evaluators.base import Evaluator
from qratk.executors.base import Executor, Group
from qratk.loop.state import Clock, SearchState, Stage
from qratk.reporters.base import Reporter
from qratk.run.journal import Journal

_NO_MEMORY = ("out of memory", "outofmemory", "memoryerror", "not enough memory", "can't allocate memory")


def of_the_machine(evaluation: Evaluation) -> bool:
    """Whether the machine is why there is no score; in journals from before that was told, the reason says so."""
    if evaluation.status == "failed":
        return any(words in evaluation.reason.lower() for words in _NO_MEMORY)
    return evaluation.status == "lost"


@dataclass(frozen=True)
class Measuring:
    """Has requests measured, writes down what comes of them, and tells the reporter."""

    evaluator: Evaluator
    executor: Executor
    journal: Journal
    reporter: Reporter
    plan: SearchPlan
    state: SearchState
    clock: Clock

    def measure(self, requests: Sequence[Request], stage: Stage) -> list[Evaluation]:
        """Evaluation of each request, in order; only what neither history nor journal knows is evaluated.

        References and replicates enter no history: no strategy hears of them.
        """
        measured = list[Evaluation]()
        add = self.state.add_reference if stage.phase in ("reference", "confirmation") else self.state.add
        lacking = [request for request in requests if self._known(request) is None]
        with closing(self._arriving(lacking, stage)) as arriving:
            for request in requests:
                known = self._known(request)
                if known is None:
                    record = self._recorded(request, arriving)
                    known = record.evaluation
                    add(record)
                    self._tell(record, stage)
                measured.append(known)
        return measured

    def _known(self, request: Request) -> Evaluation | None:
        return None if request.replicate else self.state.history.get(request.configuration, request.steps)

    def prune(self, *, over: bool = False) -> None:
        """Delete checkpoints that nothing will continue or report.

        Until the search is `over`, a training that others may share stays: they would only be cut and scored.
        """
        state, highest = self.state, self.plan.ladder.highest
        kept = {e.configuration for e in state.front(highest).evaluations} | set(self.plan.baselines)
        kept |= {state.best.configuration} if state.best else set()
        if not state.confirmations:  # each of them may still be the answer
            kept |= {e.configuration for e in state.contenders()}
        needed = {e.checkpoint for e in state.history if e.steps == highest and e.configuration in kept}
        wanted = state.best.merged if over and state.best else None  # once it is over, what was averaged
        needed |= {e.checkpoint for e in state.ingredients() if wanted is None or e.member in wanted}
        for evaluation in state.history:
            key = (evaluation.configuration, evaluation.steps)
            stays = evaluation.checkpoint in needed or (evaluation.trained_as is not None and not over)
            if evaluation.checkpoint and not stays and key not in state.discarded:
                self.evaluator.discard(evaluation)
                state.discarded.add(key)

    def _tell(self, record: Record, stage: Stage) -> None:
        self.reporter.evaluated(record, self._progress(stage, record.evaluation.steps))

    def _progress(self, stage: Stage, rung: int) -> Progress:
        return self.state.progress(self.plan, stage, rung, self.clock, self.executor.workers)

    def _recorded(self, request: Request, arriving: Iterator[None]) -> Record:
        """What the journal holds of a request, after as many groups were measured as that takes."""
        while (record := self.journal.evaluation(request.configuration, request.steps, request.replicate)) is None:
            next(arriving)
        return record

    def _arriving(self, requests: Sequence[Request], stage: Stage) -> Generator[None, None, None]:
        """Measures and records, group by group, what the journal lacks of the requests: one group at each `next`."""
        # What was recorded first was recorded whole groups at a time. The rest is cut as it was the first time, and
        # of that, whatever was recorded too is left out: groups end in any order.
        rest = list(dropwhile(self._holds, dict.fromkeys(requests)))
        if not rest:
            return
        rung = rest[0].steps
        self.reporter.progress(self._progress(stage, rung))
        groups = self._groups(rest) if stage.phase != "reference" else ((request,) for request in rest)
        for group, evaluations in self.executor.finished(groups):
            self.journal.extend([(r.candidate, e) for r, e in zip(group, evaluations, strict=True)])
            yield
            self.reporter.progress(self._progress(stage, rung))

    def _groups(self, requests: Sequence[Request]) -> Iterator[Group]:
        for group in self.evaluator.groups(requests):
            lacking = [request for request in group if not self._holds(request)]
            if lacking:
                yield lacking

    def _holds(self, request: Request) -> bool:
        return self.journal.evaluation(request.configuration, request.steps, request.replicate) is not None
