"""Many reporters as one; one that fails is dropped, so that a full disk of pictures never costs a search."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable
from typing import final

from qratk.core.result import GenerationSummary, Progress, Record, RefinementSummary, SearchPlan, SearchResult
from qratk.core.text import clean
from qratk.core.work import Work
from qratk.reporters.base import Destination, Reporter

_log = logging.getLogger("qratk")


@final
class Reporters(Reporter):
    """Tells every reporter, in order, those that speak after the others.

    A reporter that raises is closed and dropped, and the others say so once; one that is `essential` passes its
    error on, since a search whose results cannot be written should stop.
    """

    essential = True

    def __init__(self, reporters: Iterable[Reporter]) -> None:
        self._reporters = sorted(reporters, key=lambda reporter: reporter.speaks)

    @property
    def alive(self) -> tuple[Reporter, ...]:
        """The reporters that still listen."""
        return tuple(self._reporters)

    def open(self, destination: Destination) -> None:
        self._tell(lambda reporter: reporter.open(destination))

    def started(self, plan: SearchPlan) -> None:
        self._tell(lambda reporter: reporter.started(plan))

    def message(self, text: str) -> None:
        self._tell(lambda reporter: reporter.message(text))

    def working(self, work: Work) -> None:
        self._tell(lambda reporter: reporter.working(work))

    def progress(self, progress: Progress) -> None:
        self._tell(lambda reporter: reporter.progress(progress))

    def evaluated(self, record: Record, progress: Progress) -> None:
        self._tell(lambda reporter: reporter.evaluated(record, progress))

    def generation(self, summary: GenerationSummary) -> None:
        self._tell(lambda reporter: reporter.generation(summary))

    def refinement(self, summary: RefinementSummary) -> None:
        self._tell(lambda reporter: reporter.refinement(summary))

    def finished(self, result: SearchResult) -> None:
        self._tell(lambda reporter: reporter.finished(result))

    def close(self) -> None:
        """Close all; an error of an essential reporter is raised once the others are closed."""
        failed: Exception | None = None
        for reporter in self._reporters:
            try:
                reporter.close()
            except Exception as error:
                _log.warning("%s could not be closed: %s", type(reporter).__name__, clean(str(error)))
                failed = failed or (error if reporter.essential else None)
        self._reporters.clear()
        if failed is not None:
            raise failed

    def _tell(self, call: Callable[[Reporter], None]) -> None:
        for reporter in self.alive:
            # A reporter later in this round may have been dropped when it was told of an earlier one's failure.
            if reporter not in self._reporters:
                continue
            try:
                call(reporter)
            except Exception as error:
                if reporter.essential:
                    raise
                self._drop(reporter, error)

    def _drop(self, reporter: Reporter, error: Exception) -> None:
        self._reporters.remove(reporter)
        with contextlib.suppress(Exception):
            reporter.close()
        text = (
            f"{type(reporter).__name__} failed and is switched off; the search goes on without it "
            f"({type(error).__name__}: {clean(str(error))})"
        )
        if not any(other.speaks for other in self._reporters):
            _log.warning("%s", text)
        self.message(text)
