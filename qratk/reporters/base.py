"""The contract of reporters: the loop tells them what happened, they never change it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from qratk.core.result import GenerationSummary, Progress, Record, RefinementSummary, SearchPlan, SearchResult
from qratk.core.work import Work
from qratk.registry import Registry


@dataclass(frozen=True)
class Destination:
    """Where a search reports to.

    Args:
        run_dir: the run's folder, which need not be there yet.
        fit_config: what `qratk fit` needs besides the configuration that was found.
    """

    run_dir: Path
    fit_config: Mapping[str, Any] = field(default_factory=dict)


class Reporter(ABC):
    """Shows or writes what a search does. A resumed search replays what was recorded before it goes on.

    `open` comes first and `close` last, also when nothing came between. An `essential` reporter that raises ends the
    search; any other is dropped with a warning. A person reads the messages of one that `speaks`; it is told after
    the others, so that it can name what they wrote.
    """

    essential: ClassVar[bool] = False
    speaks: ClassVar[bool] = False

    @abstractmethod
    def open(self, destination: Destination) -> None:
        """Take where to report to; writes nothing yet."""

    @abstractmethod
    def started(self, plan: SearchPlan) -> None:
        """The search begins or resumes (`plan.resumed` evaluations are replayed through `evaluated`)."""

    @abstractmethod
    def message(self, text: str) -> None:
        """Something a person should know: a warning, a fallback, the start of a stage."""

    @abstractmethod
    def working(self, work: Work) -> None:
        """How far some work is that is no evaluation, again and again while it goes on; also before `started`."""

    @abstractmethod
    def progress(self, progress: Progress) -> None:
        """An evaluation is about to start."""

    @abstractmethod
    def evaluated(self, record: Record, progress: Progress) -> None:
        """An evaluation was measured and is in the journal."""

    @abstractmethod
    def generation(self, summary: GenerationSummary) -> None:
        """A generation of the global phase has ended."""

    @abstractmethod
    def refinement(self, summary: RefinementSummary) -> None:
        """A step of the local phase has ended."""

    @abstractmethod
    def finished(self, result: SearchResult) -> None:
        """The search has ended."""

    @abstractmethod
    def close(self) -> None:
        """Release the terminal and files, also after an error."""


reporters: Registry[Reporter] = Registry("reporters", "Reporter")
