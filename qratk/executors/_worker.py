"""A process that measures: it builds what it needs from plain data, and keeps nothing but that."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from qratk.core.errors import SearchError
from qratk.core.evaluation import Evaluation, FidelityLadder
from qratk.core.space import SearchSpace
from qratk.evaluators.base import EvaluationContext, Evaluator
from qratk.executors.base import Blueprint, Group


@dataclass(frozen=True)
class Workplace:
    """All that a worker is told at its start; `threads` are those of torch, None where it is not used."""

    blueprint: Blueprint
    run_dir: Path
    ladder: FidelityLadder
    seed: int
    space: SearchSpace
    reference_bits: tuple[int, ...]
    reference_ranks: tuple[int, ...]
    workers: int
    threads: int | None


@dataclass
class Task:
    """A group to measure, or an evaluation to score on test data; what was decided by now; how often it was tried."""

    work: Group | Evaluation
    decisions: Mapping[str, Any]
    attempts: int = 0


@dataclass(frozen=True)
class Done:
    """What came of a task, with what was decided and said on the way, and the digests of what it was measured with."""

    result: Any
    fingerprint: Mapping[str, str]
    decisions: Mapping[str, Any] = field(default_factory=dict)
    messages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Raised:
    """An error that a task ended in, and where."""

    error: Exception
    trace: str


def serve(connection: Connection, workplace: Workplace) -> None:
    """Answer tasks as they come, until the other end closes or its process dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal: the other end decides
    worker = _Worker(workplace)
    while True:
        try:
            task = connection.recv()
            connection.send(_answered(worker, task))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return


def _answered(worker: _Worker, task: Task) -> Done | Raised:
    try:
        return worker.answer(task)
    except Exception as error:
        return Raised(_sendable(error), traceback.format_exc())
    except SystemExit as stop:
        return Raised(SearchError(f"a part of the search ended a worker ({stop!r})"), traceback.format_exc())


def _sendable(error: Exception) -> Exception:
    """The error; a `SearchError` of the same words where it does not survive the way to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # it holds what cannot be sent, or is not made again from what it holds
        return SearchError(f"{type(error).__name__}: {error}")
    return error


class _Worker:
    def __init__(self, workplace: Workplace) -> None:
        self._workplace = workplace
        self._known: dict[str, Any] = {}
        self._decided: dict[str, Any] = {}
        self._said: list[str] = []
        if workplace.threads is not None:  # of libraries that are loaded from here on
            os.environ["OMP_NUM_THREADS"] = str(workplace.threads)

    def answer(self, task: Task) -> Done:
        self._known = dict(task.decisions)
        self._decided, self._said = {}, []
        evaluator, work = self._evaluator, task.work
        self._limit_threads()
        result = evaluator.test(work) if isinstance(work, Evaluation) else tuple(evaluator.evaluate(work))
        return Done(result, self._fingerprint, self._decided, tuple(self._said))

    @cached_property
    def _evaluator(self) -> Evaluator:
        place = self._workplace
        equipment = place.blueprint.build()
        self._limit_threads()
        context = EvaluationContext(
            place.run_dir,
            place.ladder,
            place.seed,
            equipment.module,
            equipment.datamodule,
            equipment.trainer,
            reference_bits=place.reference_bits,
            reference_ranks=place.reference_ranks,
            say=self._say,
            decided=self._decide,
            recorded=lambda key: self._known.get(key),
            workers=place.workers,
        )
        equipment.evaluator.open(context)
        equipment.evaluator.memory_model(place.space)
        return equipment.evaluator

    def _limit_threads(self) -> None:
        """Have torch compute in as many threads as at the other end; it is not loaded for that alone."""
        torch = sys.modules.get("torch")
        if torch is not None and self._workplace.threads is not None:
            torch.set_num_threads(self._workplace.threads)

    @cached_property
    def _fingerprint(self) -> dict[str, str]:
        return self._evaluator.fingerprint()

    def _say(self, text: str) -> None:
        self._said.append(text)

    def _decide(self, key: str, decide: Callable[[], Any]) -> Any:
        if key not in self._known:
            self._known[key] = self._decided[key] = decide()
        return self._known[key]


def threads_of_torch() -> int | None:
    """How many threads torch has in this process; None where it is not loaded."""
    torch = sys.modules.get("torch")
    return None if torch is None else int(torch.get_num_threads())
