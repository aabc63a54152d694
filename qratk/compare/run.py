"""The cells of a grid, run in worker processes; what is finished is left alone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Final

from qratk.compare.grid import FAILURE, LOG, Cell, Grid
from qratk.compare.pool import Pool
from qratk.compare.progress import CellProgress
from qratk.compare.worker import Answer, Search, Task, serve
from qratk.core.text import clean
from qratk.run.atomic import write_atomically

THREADS: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def run_grid(
    grid: Grid,
    search: Search,
    *,
    jobs: int = 1,
    full_reports: bool = False,
    make_pool: Callable[..., Pool] = Pool,
    progress: Callable[..., CellProgress] = CellProgress,
) -> None:
    """Run the search of every cell that is not finished; failures are recorded in cells, and the others go on.

    Raises `RunDirectoryError` before anything runs when a cell holds another search, `KeyboardInterrupt` on Ctrl-C.
    """
    grid.prepare()
    waiting = [cell for cell in grid.cells if not cell.finished]
    if not waiting:
        return
    tasks = [Task(tuple(grid.arguments(cell)), cell.folder / LOG, full_reports) for cell in waiting]
    jobs = max(1, min(jobs, len(waiting)))
    environment = dict.fromkeys(THREADS, "1") if jobs > 1 else {}
    environment["TOKENIZERS_PARALLELISM"] = "false"
    pool = make_pool(jobs, partial(serve, search=search), environment=environment)
    with (
        progress(
            len(waiting), len(grid.cells) - len(waiting), jobs, logs={str(cell): cell.folder / LOG for cell in waiting}
        ) as shown,
        closing(pool.run(tasks)) as answers,
    ):
        for number, answer in answers:
            if answer.interrupted:
                raise KeyboardInterrupt
            reason = record(waiting[number], answer)
            shown.ended(str(waiting[number]), reason)


def record(cell: Cell, answer: Answer) -> str:
    """Keep why a cell failed, or forget why it once did; the reason, empty when it did not fail."""
    path = cell.folder / FAILURE
    reason = answer.reason
    if not reason and not cell.finished:
        reason = "it ended without a result"
    if reason:
        write_atomically(path, json.dumps({"reason": clean(reason)}) + "\n")
    elif path.exists():
        os.unlink(path)
    return reason
