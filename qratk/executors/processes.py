"""Executor that measures groups side by side, in processes of this machine."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from qratk.core.errors import ConfigurationError, SearchError
from qratk.core.evaluation import Evaluation
from qratk.core.space import SearchSpace
from qratk.evaluators.base import EvaluationContext, Evaluator
from qratk.executors._worker import Done, Raised, Task, Workplace, serve, threads_of_torch
from qratk.executors.base import Blueprint, Equipment, Executor, Group, executors
from qratk.executors.pool import Lost, Pool


@executors.register("processes")
class Processes(Executor):
    """Measures groups side by side, each in a process of its own that loads model and data anew.

    Scores equal those of `serial` to the bit for equal groups. A process that is killed costs its group, which is tried
    again in another; after so many attempts its candidates are lost, with the reason, until the search is resumed.

    Args:
        workers: processes side by side, beside the one that decides.
        devices: indices of the accelerators; process n sees the n-th alone, in turn. By default each sees all.
        attempts: how often a group is tried when its process dies.
    """

    def __init__(self, workers: int = 2, devices: Sequence[int] = (), attempts: int = 3) -> None:
        if workers < 1 or attempts < 1 or any(device < 0 for device in devices):
            raise ConfigurationError(
                "workers and attempts must be at least 1, and devices at least 0; got "
                f"{workers}, {attempts} and {list(devices)}"
            )
        self._size = workers
        self._devices = tuple(devices)
        self._attempts = attempts
        self._begun: _Begun | None = None
        self._opened: tuple[Evaluator, EvaluationContext, Blueprint] | None = None
        self._known: dict[str, Any] = {}

    @property
    def workers(self) -> int:
        """The number of processes that measure."""
        return self._size

    def open(self, evaluator: Evaluator, context: EvaluationContext, blueprint: Blueprint | None) -> None:
        """Open the evaluator here too: it tells the problem, and cuts groups.

        Raises `ConfigurationError` without a blueprint, unless the evaluator itself is plain data.
        """
        blueprint = blueprint or _pickled(evaluator, context)
        heard = replace(context, decided=self._hearing(context.decided), recorded=self._recalling(context.recorded))
        evaluator.open(heard)
        self._opened = evaluator, heard, blueprint

    def begin(self, space: SearchSpace) -> None:
        """Get ready to begin processes; each begins with its first group."""
        assert self._opened is not None, "open comes first"
        evaluator, context, blueprint = self._opened
        place = Workplace(
            blueprint,
            context.run_dir.absolute(),
            context.ladder,
            context.seed,
            space,
            context.reference_bits,
            context.reference_ranks,
            self._size,
            threads_of_torch(),
        )
        environments = [{"CUDA_VISIBLE_DEVICES": str(device)} for device in self._devices]
        pool: Pool[Task] = Pool(self._size, serve, (place,), environments=environments)
        self._begun = _Begun(evaluator, context, pool, evaluator.fingerprint())

    def finished(self, groups: Iterable[Group]) -> Iterator[tuple[Group, Sequence[Evaluation]]]:
        """Each group with its evaluations, as they end."""
        with closing(self._answered(groups)) as answered:
            for group, result in answered:
                yield group, self._lost(group, result) if isinstance(result, Lost) else result

    def tested(self, evaluations: Iterable[Evaluation]) -> Iterator[tuple[Evaluation, dict[str, float]]]:
        """Each evaluation with its scores on test data, as they end."""
        with closing(self._answered(evaluations)) as answered:
            for evaluation, result in answered:
                if isinstance(result, Lost):
                    raise SearchError(
                        f"{evaluation.configuration} could not be scored on test data in {self._attempts} attempts: "
                        f"{result.reason}. Everything measured is kept; run the same command to go on."
                    )
                yield evaluation, result

    def close(self) -> None:
        """Stop the processes."""
        if self._begun is not None:
            self._begun.pool.close()
        self._begun = None

    def _answered(self, work: Iterable[Any]) -> Generator[tuple[Any, Any], None, None]:
        """Each piece of work with what came of it: the last `Lost` when no attempt was answered."""
        assert self._begun is not None, "begin comes first"
        pool, waiting, again = self._begun.pool, iter(work), deque[Task]()
        try:
            while True:
                while pool.has_room and (task := again.popleft() if again else self._next(waiting)) is not None:
                    pool.hand_out(task)
                if not pool.is_busy:
                    return
                for task, answer in pool.answers():
                    if not isinstance(answer, Lost):
                        yield task.work, self._begun.result(answer)
                    elif task.attempts + 1 < self._attempts:
                        again.append(Task(task.work, dict(self._known), task.attempts + 1))
                    elif self._begun.has_answered:
                        yield task.work, answer
                    else:
                        raise SearchError(
                            f"no worker could measure anything: {answer.reason}. Fewer workers take less memory; with "
                            "executor 'serial' there are none."
                        )
        finally:
            pool.give_up()

    def _next(self, waiting: Iterator[Any]) -> Task | None:
        work = next(waiting, None)
        return None if work is None else Task(work, dict(self._known))

    def _lost(self, group: Group, lost: Lost) -> list[Evaluation]:
        assert self._begun is not None
        reason = f"{lost.reason} ({self._attempts} attempts)"
        return [
            Evaluation(
                request.configuration,
                request.steps,
                float("-inf"),
                self._begun.evaluator.footprint(request.configuration),
                status="lost",
                reason=reason,
                replicate=request.replicate,
            )
            for request in group
        ]

    def _hearing(self, decided: Callable[[str, Callable[[], Any]], Any]) -> Callable[[str, Callable[[], Any]], Any]:
        def decide(key: str, decision: Callable[[], Any]) -> Any:
            self._known[key] = decided(key, decision)
            return self._known[key]

        return decide

    def _recalling(self, recorded: Callable[[str], Any]) -> Callable[[str], Any]:
        def recall(key: str) -> Any:
            value = recorded(key)
            if value is not None:
                self._known[key] = value
            return value

        return recall


@dataclass
class _Begun:
    """What is there once the problem is known."""

    evaluator: Evaluator
    context: EvaluationContext
    pool: Pool[Task]
    fingerprint: Mapping[str, str]
    has_answered: bool = False

    def result(self, answer: Done | Raised) -> Any:
        """What a worker measured; takes in what it decided and said, and raises what it raised."""
        if isinstance(answer, Raised):
            answer.error.add_note(f"In a worker:\n{answer.trace}")
            raise answer.error
        if answer.fingerprint != self.fingerprint:
            raise SearchError(
                f"a worker has another model or other data: {dict(answer.fingerprint)}, not {dict(self.fingerprint)}; "
                "do not change files while a search runs"
            )
        for message in answer.messages:
            self.context.say(message)
        for key, value in answer.decisions.items():
            self.context.decided(key, partial(copy, value))
        self.has_answered = True
        return answer.result


@dataclass(frozen=True)
class _PickledEvaluator:
    """An evaluator that needs no model, as its options made it."""

    content: bytes

    def build(self) -> Equipment:
        """The evaluator, not opened."""
        return Equipment(pickle.loads(self.content))


def _pickled(evaluator: Evaluator, context: EvaluationContext) -> Blueprint:
    needed = (
        "the executor 'processes' builds the evaluator anew in each process, with its model and data: begin the search "
        "by `qratk search`, or give `run` a blueprint"
    )
    if context.module is not None or context.trainer is not None:
        raise ConfigurationError(needed)
    try:
        return _PickledEvaluator(pickle.dumps(evaluator))
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"{needed} ({error})") from error
