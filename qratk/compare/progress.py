"""How far a comparison is: a bar on a terminal, elsewhere one line a cell."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from qratk.core.text import clean, duration

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class CellProgress:
    """Cells done of all, and the time left, judged by the cells that were run.

    Args:
        total: cells to run.
        done: cells that were finished before.
        jobs: cells side by side.
        stream: where to write; standard error if not given.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        total: int,
        done: int,
        jobs: int,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._before, self._jobs = total, done, jobs
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._ran = 0
        self._failed = 0
        self._started = clock()
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> CellProgress:
        self._started = self._clock()
        if self._stream.isatty():
            self._begin_bar()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def seconds_left(self) -> float | None:
        """Seconds until all are done; None before one was run."""
        left = self._total - self._ran
        if not self._ran or not left:
            return None if left else 0.0
        return (self._clock() - self._started) / self._ran * left

    def ended(self, name: str, reason: str) -> None:
        """A cell has ended; `reason` says why it failed, and is empty if it did not."""
        self._ran += 1
        self._failed += bool(reason)
        failed = f"; {self._failed} failed" if self._failed else ""
        counts = f"{self._before + self._ran} of {self._before + self._total} cells{failed}"
        left = f"{duration(self.seconds_left)} left"
        if self._bar is None or self._task is None:
            what = f"failed: {clean(reason)}" if reason else "done"
            print(f"[{counts}, {left}] {name}: {what}", file=self._stream, flush=True)
            return
        if reason:
            self._bar.console.print(f"{name} failed: {clean(reason)}", markup=False, highlight=False)
        self._bar.update(self._task, advance=1, description=f"{counts}, {left}")

    def _begin_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=Console(file=self._stream)
        )
        everything = self._before + self._total
        self._task = self._bar.add_task(
            f"{self._before} of {everything} cells", total=everything, completed=self._before
        )
        self._bar.start()
