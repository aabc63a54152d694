"""The pictures of a run directory: front.png, allocation.png, progress.png."""

from __future__ import annotations

from pathlib import Path
from typing import final

from qratk.core.result import GenerationSummary, Progress, Record, RefinementSummary, SearchPlan, SearchResult
from qratk.core.work import Work
from qratk.reporters._throttle import Throttle
from qratk.reporters.base import Destination, Reporter, reporters
from qratk.reporters.figures import FrontParts, allocation_figure, front_figure, progress_figure, to_png
from qratk.reporters.tracker import Tracker
from qratk.run import files
from qratk.run.atomic import write_atomically


@final
@reporters.register("pictures")
class Pictures(Reporter):
    """Draws the pictures anew when a generation ends, as long as that takes little of the time, and at the end."""

    def __init__(self) -> None:
        self._folder = Path()
        self._tracker: Tracker | None = None
        self._throttle = Throttle()

    def open(self, destination: Destination) -> None:
        self._folder = destination.run_dir

    def started(self, plan: SearchPlan) -> None:
        self._tracker = Tracker(plan)

    def message(self, text: str) -> None:
        """Nothing to draw."""

    def working(self, work: Work) -> None:
        """Nothing to draw."""

    def progress(self, progress: Progress) -> None:
        """Nothing to draw."""

    def evaluated(self, record: Record, progress: Progress) -> None:
        if self._tracker is not None:
            self._tracker.add(record, progress)

    def generation(self, summary: GenerationSummary) -> None:
        if self._tracker is not None and not self._tracker.replaying:
            self._tracker.hear(summary.best)
            if self._throttle.ready:
                self._draw(FrontParts.of_tracker(self._tracker))

    def refinement(self, summary: RefinementSummary) -> None:
        """Nothing: a step of the local phase adds one point, which the end shows."""

    def finished(self, result: SearchResult) -> None:
        if self._tracker is not None:
            self._tracker.hear(result.best)
        self._draw(FrontParts.of_result(result))

    def close(self) -> None:
        """Nothing is kept open."""

    def _draw(self, parts: FrontParts) -> None:
        tracker = self._tracker
        if tracker is None:
            return
        problem, space = tracker.plan.problem, tracker.plan.problem.space
        with self._throttle.drawing():
            self._write(files.FRONT_PICTURE, to_png(front_figure(parts)))
            picture = progress_figure(tracker.records, tracker.plan.ladder.highest, baseline=tracker.best_baseline)
            self._write(files.PROGRESS_PICTURE, to_png(picture))
            if parts.best is not None:
                best = parts.best.configuration
                picture = allocation_figure(best, space.layer_names, importance=problem.importance, space=space)
                self._write(files.ALLOCATION_PICTURE, to_png(picture))

    def _write(self, name: str, data: bytes) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._folder / name, data)
