"""The cells of a comparison, side by side in worker processes."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from multiprocessing.connection import Connection

from qratk.compare.worker import Answer, Task
from qratk.executors import pool


class Pool:
    """Processes that run tasks, begun when there is one for them.

    Args:
        jobs: processes side by side.
        target: what a process does with its end of a pipe.
        environment: variables that they see, where they are not set.
    """

    def __init__(
        self,
        jobs: int,
        target: Callable[[Connection], None],
        *,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        unset = {key: value for key, value in (environment or {}).items() if key not in os.environ}
        self._workers: pool.Pool[Task] = pool.Pool(jobs, target, environments=[unset])

    def run(self, tasks: Sequence[Task]) -> Generator[tuple[int, Answer], None, None]:
        """Position of each task and its answer, as they end; all processes are stopped when this is closed."""
        waiting, positions = deque(tasks), {id(task): number for number, task in enumerate(tasks)}
        try:
            while waiting or self._workers.is_busy:
                while waiting and self._workers.has_room:
                    self._workers.hand_out(waiting.popleft())
                for task, answer in self._workers.answers():
                    yield positions[id(task)], Answer(answer.reason) if isinstance(answer, pool.Lost) else answer
        finally:
            self._workers.close()  # what was measured is in journals
