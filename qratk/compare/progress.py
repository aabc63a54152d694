"""How far a comparison is: a bar on a terminal, elsewhere a line a cell, and now and then one for each that runs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Event, Thread
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
        logs: what each cell to run writes, by the cell's name.
        every: seconds between lines about the cells that run, where there is no terminal.
        stream: where to write; standard error if not given.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        total: int,
        done: int,
        jobs: int,
        *,
        logs: Mapping[str, Path] | None = None,
        every: float = 120.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._before, self._jobs = total, done, jobs
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._logs, self._every = dict(logs or {}), every
        self._over = Event()
        self._teller: Thread | None = None
        self._ran = 0
        self._failed = 0
        self._started = clock()
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> CellProgress:
        self._started = self._clock()
        if self._stream.isatty():
            self._begin_bar()
        else:
            self._teller = Thread(target=self._tell, name="qratk-compare-progress", daemon=True)
            self._teller.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._teller is not None:
            self._teller.join()
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
        self._logs.pop(name, None)
        self._failed += bool(reason)
        counts, left = self._counts(), f"{duration(self.seconds_left)} left"
        if self._bar is None or self._task is None:
            what = f"failed: {clean(reason)}" if reason else "done"
            print(f"[{counts}, {left}] {name}: {what}", file=self._stream, flush=True)
            return
        if reason:
            self._bar.console.print(f"{name} failed: {clean(reason)}", markup=False, highlight=False)
        self._bar.update(self._task, advance=1, description=f"{counts}, {left}")

    def _counts(self) -> str:
        failed = f"; {self._failed} failed" if self._failed else ""
        return f"{self._before + self._ran} of {self._before + self._total} cells{failed}"

    def _tell(self) -> None:
        while not self._over.wait(self._every):
            for name, log in list(self._logs.items()):
                if line := _last_line(log):
                    print(f"[{self._counts()}] {name}: {line}", file=self._stream, flush=True)

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


def _last_line(log: Path, most: int = 4096) -> str:
    """The last line that says anything; empty when there is none yet. A line that is drawn over counts as several."""
    try:
        with log.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - most))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines()]
    return clean(next((line for line in reversed(lines) if line), ""))
