"""Worker processes that keep their imports; one that is killed costs its task, not the others."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from qratk.compare.worker import Answer, Task, serve


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    task: int | None = None


class Pool:
    """Processes that run tasks, begun when there is one for them.

    Args:
        jobs: processes side by side.
        environment: variables that they see, where they are not set.
        target: what a process does with its end of a pipe.
    """

    def __init__(
        self,
        jobs: int,
        *,
        environment: Mapping[str, str] | None = None,
        target: Callable[[Connection], None] = serve,
    ) -> None:
        self._jobs = jobs
        self._environment = dict(environment or {})
        self._target = target
        self._workers: list[_Worker] = []

    def run(self, tasks: Sequence[Task]) -> Generator[tuple[int, Answer], None, None]:
        """Position of each task and its answer, as they end; all processes are stopped when this is closed."""
        waiting = deque(range(len(tasks)))
        try:
            while waiting or any(worker.task is not None for worker in self._workers):
                self._hand_out(tasks, waiting)
                yield from self._collect()
        finally:
            self._stop()

    def _hand_out(self, tasks: Sequence[Task], waiting: deque[int]) -> None:
        while waiting and len(self._workers) < self._jobs:
            self._workers.append(self._begin())
        for worker in self._workers:
            if worker.task is None and waiting:
                worker.task = waiting.popleft()
                with contextlib.suppress(BrokenPipeError):  # it died: `_collect` sees that
                    worker.connection.send(tasks[worker.task])

    def _collect(self) -> Iterator[tuple[int, Answer]]:
        ready = set(wait([w.connection for w in self._workers if w.task is not None]))
        for worker in [w for w in self._workers if w.connection in ready]:
            number, worker.task = worker.task, None
            assert number is not None
            try:
                answer: Answer = worker.connection.recv()
            except (EOFError, ConnectionResetError):
                answer = self._lost(worker)
            yield number, answer

    def _lost(self, worker: _Worker) -> Answer:
        worker.process.join()
        self._workers.remove(worker)
        worker.connection.close()
        code = worker.process.exitcode or 0
        if code >= 0:
            return Answer(f"its process ended with status {code}")
        hint = "; out of memory?" if -code == signal.SIGKILL else ""
        return Answer(f"its process was killed by {signal.Signals(-code).name}{hint}")

    def _begin(self) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        # No daemon: those may have no children, and data may be loaded by processes of their own.
        process = context.Process(target=self._target, args=(theirs,))
        with _set(self._environment):
            process.start()
        theirs.close()  # so that its death is seen as the end of the pipe
        return _Worker(process, ours)

    def _stop(self) -> None:
        for worker in self._workers:
            worker.connection.close()
            if worker.task is not None:
                worker.process.terminate()  # what it measured is in its journal
        for worker in self._workers:
            worker.process.join(timeout=10)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        self._workers.clear()


@contextlib.contextmanager
def _set(environment: Mapping[str, str]) -> Iterator[None]:
    added = {key: value for key, value in environment.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)
