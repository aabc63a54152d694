"""TensorBoard: scalars, the front and the allocation as images, hyper-parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from qratk.core.evaluation import Evaluation
from qratk.core.result import GenerationSummary, Progress, Record, RefinementSummary, SearchPlan, SearchResult
from qratk.core.text import clean
from qratk.core.work import Work
from qratk.reporters._throttle import Throttle
from qratk.reporters.base import Destination, Reporter, reporters
from qratk.reporters.figures import MIB, FrontParts, allocation_figure, front_figure, to_array
from qratk.reporters.tracker import Tracker, budget_bytes
from qratk.run import files

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

SUFFIX = ".qratk"


@final
@reporters.register("tensorboard")
class TensorBoardReporter(Reporter):
    """Writes event files for TensorBoard.

    They lie in the run's folder `tensorboard`. Since a resumed search replays what was recorded, `started` first
    removes those that an earlier run of this reporter left there (known by their suffix `.qratk`; others stay), so that
    no point appears twice.
    Images are drawn at the end, and when a generation or refinement step ends while that takes little of the time.
    Scalars of evaluations are drawn against their index, those of generations and refinement steps against theirs.
    """

    def __init__(self) -> None:
        self._folder = Path()
        self._writer: SummaryWriter | None = None
        self._tracker: Tracker | None = None
        self._drawn: tuple[object, ...] = ()
        self._throttle = Throttle()

    def open(self, destination: Destination) -> None:
        self._folder = destination.run_dir / files.TENSORBOARD

    def started(self, plan: SearchPlan) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._folder.mkdir(parents=True, exist_ok=True)
        for old in self._folder.glob(f"events.out.tfevents.*{SUFFIX}"):
            old.unlink()
        self._tracker = Tracker(plan)
        self._writer = SummaryWriter(str(self._folder), filename_suffix=SUFFIX)
        self._writer.add_text("search", _describe(plan))

    def message(self, text: str) -> None:
        if self._writer is not None and self._tracker is not None:
            self._writer.add_text("messages", clean(text), len(self._tracker.records))

    def working(self, work: Work) -> None:
        """Nothing to log."""

    def progress(self, progress: Progress) -> None:
        """Nothing to draw."""

    def evaluated(self, record: Record, progress: Progress) -> None:
        if self._tracker is None:
            return
        self._tracker.add(record, progress)
        evaluation = record.evaluation
        self._scalars("evaluation", self._figures(evaluation), record.index)
        self._scalars("evaluation", {"seconds": evaluation.seconds, "failed": float(not evaluation.ok)}, record.index)
        if evaluation.ok:
            fresh = "_fresh_seeds" if evaluation.replicate else ""
            self._scalars("score", {f"at_{evaluation.steps}_steps{fresh}": evaluation.score}, record.index)
            self._scalars(f"figures_at_{evaluation.steps}_steps{fresh}", evaluation.figures, record.index)
        best = self._tracker.best
        if best is not None:
            self._scalars("best", {"score": best.score, **self._figures(best)}, record.index)
            self._scalars("best_figures", best.figures, record.index)

    def generation(self, summary: GenerationSummary) -> None:
        if self._tracker is None:
            return
        self._tracker.hear(summary.best)
        figures = {
            "hypervolume": summary.hypervolume,
            "relative_progress": summary.relative_progress,
            "front_size": float(len(summary.front)),
            "seconds": summary.seconds,
        }
        self._scalars("generation", figures, summary.number)
        if summary.surrogate is not None:
            quality = summary.surrogate
            figures = {
                "spearman": quality.spearman,
                "pearson": quality.pearson,
                "low_fidelity_spearman": quality.low_fidelity_spearman,
                "pairs": float(quality.pairs),
                "used": float(summary.surrogate_used),
            }
            self._scalars("surrogate", figures, summary.number)
        if self._throttle.ready:
            self._images(FrontParts.of_tracker(self._tracker))

    def refinement(self, summary: RefinementSummary) -> None:
        if self._tracker is None:
            return
        self._tracker.hear(summary.best)
        figures = {"improved": float(summary.improved), "seconds": summary.seconds, **summary.diagnostics}
        if summary.best is not None:
            figures["best_score"] = summary.best.score
        self._scalars("refinement", figures, summary.number)
        if self._throttle.ready:
            self._images(FrontParts.of_tracker(self._tracker))

    def finished(self, result: SearchResult) -> None:
        if self._tracker is None or self._writer is None:
            return
        self._tracker.hear(result.best)
        self._images(FrontParts.of_result(result))
        for rank, own in enumerate(result.confirmations):  # the best mean first
            figures = {"mean": own.mean, "low": own.low, "high": own.high, "selected_by": own.selected.score}
            self._scalars("confirmed", figures, rank)
        self._hyper_parameters(result)
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _figures(self, evaluation: Evaluation) -> dict[str, float]:
        assert self._tracker is not None
        problem = self._tracker.plan.problem
        used = budget_bytes(problem, evaluation)
        return {
            "MiB": used / MIB,
            "fraction_of_budget": used / problem.budget.limit_bytes,
            "average_bits": problem.memory.average_bits(evaluation.configuration),
            "average_rank": problem.memory.average_rank(evaluation.configuration),
        }

    def _scalars(self, group: str, figures: Mapping[str, float], step: int) -> None:
        if self._writer is None:
            return
        for name, value in figures.items():
            if math.isfinite(value):
                self._writer.add_scalar(f"{group}/{name}", float(value), step)

    def _images(self, parts: FrontParts) -> None:
        assert self._tracker is not None
        drawn = (len(parts.measured), len(parts.references), parts.best)
        if self._writer is None or drawn == self._drawn:
            return
        self._drawn = drawn
        writer, step, problem = self._writer, len(self._tracker.records), self._tracker.plan.problem
        with self._throttle.drawing():
            writer.add_image("front", to_array(front_figure(parts)), step, dataformats="HWC")
            if parts.best is not None:
                best, space = parts.best.configuration, problem.space
                picture = allocation_figure(best, space.layer_names, importance=problem.importance, space=space)
                writer.add_image("allocation", to_array(picture), step, dataformats="HWC")

    def _hyper_parameters(self, result: SearchResult) -> None:
        from torch.utils.tensorboard import summary as summaries

        writer: Any = self._writer
        hparams: Any = summaries.hparams
        # Not `add_hparams`: that opens a second event file, without our suffix, which a resumed search would double.
        for summary in hparams(hyper_parameters(result.plan), _outcome(result)):
            writer.file_writer.add_summary(summary)
        for name, value in _outcome(result).items():
            writer.add_scalar(name, value)


def hyper_parameters(plan: SearchPlan) -> dict[str, str | float]:
    """What distinguishes one search from another, for TensorBoard's table."""
    budget, space = plan.problem.budget, plan.problem.space
    return {
        "name": clean(plan.name),
        "layers": float(space.num_layers),
        "bits": " ".join(map(str, space.bits)),
        "ranks": " ".join(map(str, space.ranks)),
        "budget_MiB": budget.limit_bytes / MIB,
        "budget_scope": budget.scope,
        "max_average_bits": float(budget.max_average_bits or 0.0),
        "steps": " ".join(map(str, plan.ladder.steps)),
        "reduction_factor": plan.ladder.reduction_factor,
    }


def _outcome(result: SearchResult) -> dict[str, float]:
    outcome = {"hparam/best_score": result.best.score, "hparam/evaluations": float(len(result.history))}
    if result.confirmed is not None:
        outcome["hparam/confirmed_score"] = result.confirmed.mean
    outcome["hparam/best_MiB"] = budget_bytes(result.plan.problem, result.best) / MIB
    if result.generations:
        outcome["hparam/hypervolume"] = result.generations[-1].hypervolume
    return {name: value for name, value in outcome.items() if math.isfinite(value)}


def _describe(plan: SearchPlan) -> str:
    rows = "".join(f"| {name} | {value} |\n" for name, value in hyper_parameters(plan).items())
    return f"| setting | value |\n|---|---|\n{rows}"
