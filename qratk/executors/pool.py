"""Worker processes that keep what they loaded; one that is killed costs its task, not the others."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Lost:
    """A process died over its task; `reason` is what its end tells."""

    reason: str


@dataclass
class _Worker(Generic[T]):
    slot: int
    process: BaseProcess
    connection: Connection
    task: T | None = None


class Pool(Generic[T]):
    """Spawned processes that answer one task at a time over a pipe, begun when there is a task for them.

    Args:
        size: processes side by side.
        target: what a process does with its end of a pipe and with `arguments`: answer each object that it receives by
            one, until the other end closes (`EOFError`).
        arguments: plain data that every process is handed.
        environments: variables that the processes see, by their place; taken in turn.
    """

    def __init__(
        self,
        size: int,
        target: Callable[..., None],
        arguments: tuple[Any, ...] = (),
        *,
        environments: Sequence[Mapping[str, str]] = (),
    ) -> None:
        self._size = size
        self._target = target
        self._arguments = arguments
        self._environments = environments
        self._workers: list[_Worker[T]] = []

    @property
    def has_room(self) -> bool:
        """Whether another task could begin."""
        return len(self._workers) < self._size or any(worker.task is None for worker in self._workers)

    @property
    def is_busy(self) -> bool:
        """Whether any task is not answered yet."""
        return any(worker.task is not None for worker in self._workers)

    def hand_out(self, task: T) -> None:
        """Give a task to a process without one; there must be room."""
        worker = next((w for w in self._workers if w.task is None), None) or self._begin()
        worker.task = task
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it died: `answers` sees that
            worker.connection.send(task)

    def answers(self) -> Iterator[tuple[T, Any]]:
        """Tasks that are answered by now, at least one while any is handed out, with their answers or `Lost`."""
        ready = set(wait([w.connection for w in self._workers if w.task is not None]))
        for worker in [w for w in self._workers if w.connection in ready]:
            task, worker.task = worker.task, None
            assert task is not None
            try:
                answer = worker.connection.recv()
            except (EOFError, ConnectionResetError):
                answer = self._lost(worker)
            yield task, answer

    def give_up(self) -> None:
        """Stop the processes that have a task; what they were at is lost."""
        self._stop([worker for worker in self._workers if worker.task is not None])

    def close(self) -> None:
        """Stop all processes."""
        self._stop(list(self._workers))

    def _lost(self, worker: _Worker[T]) -> Lost:
        worker.process.join()
        self._workers.remove(worker)
        worker.connection.close()
        code = worker.process.exitcode or 0
        if code >= 0:
            return Lost(f"its process ended with status {code}")
        hint = "; out of memory?" if -code == signal.SIGKILL else ""
        return Lost(f"its process was killed by {signal.Signals(-code).name}{hint}")

    def _begin(self) -> _Worker[T]:
        context = multiprocessing.get_context("spawn")
        taken = {worker.slot for worker in self._workers}
        slot = next(number for number in range(self._size) if number not in taken)
        ours, theirs = context.Pipe()
        # No daemon: those may have no children, and data may be loaded by processes of their own.
        process = context.Process(target=_ended_with_its_parent, args=(self._target, theirs, *self._arguments))
        with _set(self._environments[slot % len(self._environments)] if self._environments else {}):
            process.start()
        theirs.close()  # so that its death is seen as the end of the pipe
        worker = _Worker[T](slot, process, ours)
        self._workers.append(worker)
        return worker

    def _stop(self, workers: Sequence[_Worker[T]]) -> None:
        for worker in workers:
            worker.connection.close()
            if worker.task is not None:
                worker.process.terminate()
        for worker in workers:
            worker.process.join(timeout=10)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            self._workers.remove(worker)


def _ended_with_its_parent(target: Callable[..., None], *arguments: Any) -> None:
    """Run the target in a process that ends when the one that began it does, whatever killed that."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)  # nobody would hear of what is still measured

    threading.Thread(target=watch, daemon=True).start()
    target(*arguments)


@contextlib.contextmanager
def _set(environment: Mapping[str, str]) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
