"""The files of a run that other tools read: evaluations.csv, front.json, best.yaml, result.json."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import platform
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, final

import yaml

from qratk.core.errors import RunDirectoryError
from qratk.core.evaluation import Evaluation, SurrogateQuality
from qratk.core.memory import format_bytes
from qratk.core.pareto import ParetoFront
from qratk.core.problem import Problem
from qratk.core.result import (
    Comparison,
    GenerationSummary,
    Progress,
    Record,
    RefinementSummary,
    SearchPlan,
    SearchResult,
)
from qratk.core.text import clean, without_secrets
from qratk.reporting.base import Reporter
from qratk.reporting.tracker import Tracker, budget_bytes
from qratk.run import files
from qratk.run.atomic import write_atomically

COLUMNS = (
    "phase", "generation", "origin", "bits", "ranks", "steps", "score", "storage_bytes", "average_bits",
    "average_rank", "seconds", "status", "reason",
)  # fmt: skip
LIBRARIES = (
    "qratk", "bitsandbytes", "botorch", "datasets", "gpytorch", "hqq", "lightning", "lm-eval", "matplotlib", "numpy",
    "peft", "pymoo", "safetensors", "scipy", "tensorboard", "torch", "torchmetrics", "transformers",
)  # fmt: skip


@final
class RunFiles(Reporter):
    """Writes the files of a run directory; a kill at any moment leaves each of them well-formed.

    `evaluations.csv` grows by one row an evaluation, written in one call, and is replaced as a whole when a
    generation ends; all other files are replaced atomically. `front.json` and `best.yaml` are refreshed after every
    generation and refinement step, so that an interrupted search leaves a usable best. While a resumed search
    replays its records, the files of the earlier run stay as they are.

    Args:
        run_dir: made if it is missing.
        fit_config: what `qratk fit` needs besides the configuration; `model.configuration` is added to it.
    """

    essential = True

    def __init__(self, run_dir: str | Path, *, fit_config: Mapping[str, Any] | None = None) -> None:
        self._folder = Path(run_dir)
        self._fit_config = dict(fit_config or {})
        self._rows: list[str] = []
        self._tracker: Tracker | None = None
        self._pending = False

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files that exist by now."""
        names = (files.EVALUATIONS, files.FRONT, files.BEST, files.RESULT)
        return tuple(path for path in (self._folder / name for name in names) if path.exists())

    def started(self, plan: SearchPlan) -> None:
        self._tracker = Tracker(plan)
        self._rows = [_csv_line(COLUMNS)]
        self._pending = plan.resumed > 0
        with self._writing():
            self._folder.mkdir(parents=True, exist_ok=True)
            if not self._pending:
                self._write_table()

    def message(self, text: str) -> None:
        """Nothing: messages are for people."""

    def progress(self, progress: Progress) -> None:
        """Nothing: only what was measured is written."""

    def evaluated(self, record: Record, progress: Progress) -> None:
        tracker = self._known()
        tracker.add(record, progress)
        line = _csv_line(evaluation_row(tracker.plan.problem, record))
        self._rows.append(line)
        with self._writing():
            if not self._pending:
                _append(self._folder / files.EVALUATIONS, line)
            elif not tracker.replaying:
                self._refresh()

    def generation(self, summary: GenerationSummary) -> None:
        self._known().hear(summary.best)
        with self._writing():
            self._refresh(summary.front)

    def refinement(self, summary: RefinementSummary) -> None:
        self._known().hear(summary.best)
        with self._writing():
            self._refresh()

    def finished(self, result: SearchResult) -> None:
        self._known().hear(result.best)
        self._pending = False
        with self._writing():
            self._write_table()
            self._write_front(result.front)
            self._write_best(result.best)
            write_atomically(self._folder / files.RESULT, to_json(result_data(result)))

    def close(self) -> None:
        """Nothing is kept open."""

    def _known(self) -> Tracker:
        if self._tracker is None:
            raise RuntimeError("`started` must be called before anything is measured")
        return self._tracker

    def _refresh(self, front: ParetoFront | None = None) -> None:
        tracker = self._known()
        if tracker.replaying:
            return
        self._pending = False
        self._write_table()
        self._write_front(front or tracker.front)
        self._write_best(tracker.best)

    def _write_table(self) -> None:
        write_atomically(self._folder / files.EVALUATIONS, "".join(self._rows))

    def _write_front(self, front: ParetoFront) -> None:
        write_atomically(self._folder / files.FRONT, to_json(front_data(self._known().plan, front)))

    def _write_best(self, best: Evaluation | None) -> None:
        if best is not None:
            text = best_text(self._known().plan.problem, best, self._fit_config)
            write_atomically(self._folder / files.BEST, text)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunDirectoryError(
                f"the files of the run cannot be written to {self._folder} ({error.strerror or error}). Nothing that "
                "was measured is lost: the journal keeps it. Free space on that disk, or restore access to the "
                "folder, and run the same command again; it goes on where it stopped."
            ) from error


def _append(path: Path, line: str) -> None:
    # One write call in append mode: a kill leaves the row out or in. A full disk may take part of it: cut that off.
    data = line.encode("utf-8")
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        if os.write(descriptor, data) != len(data):
            os.ftruncate(descriptor, size)
            raise OSError("no space left for a row of the table")
    finally:
        os.close(descriptor)


def _csv_line(row: tuple[object, ...]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(row)
    return buffer.getvalue()


def evaluation_row(problem: Problem, record: Record) -> tuple[object, ...]:
    """One row of `evaluations.csv`, as `COLUMNS`; bits and ranks with blanks between; the score empty if it failed."""
    candidate, evaluation = record.candidate, record.evaluation
    configuration = evaluation.configuration
    return (
        candidate.phase,
        candidate.generation,
        candidate.origin,
        " ".join(map(str, configuration.bits)),
        " ".join(map(str, configuration.ranks)),
        evaluation.steps,
        evaluation.score if evaluation.ok else "",
        evaluation.footprint.storage_bytes,
        round(problem.memory.average_bits(configuration), 6),
        round(problem.memory.average_rank(configuration), 6),
        round(evaluation.seconds, 3),
        evaluation.status,
        clean(evaluation.reason),
    )


def best_text(problem: Problem, best: Evaluation, fit_config: Mapping[str, Any]) -> str:
    """YAML of `fit_config` with the best's configuration, after comments that say what was measured of it."""
    config = without_secrets(fit_config)
    model = config["model"] = dict(config.get("model") or {})
    target = model
    if "class_path" in model:  # the other way to write a model in Lightning's YAML
        target = model["init_args"] = dict(model.get("init_args") or {})
    target["configuration"] = str(best.configuration)
    used = budget_bytes(problem, best)
    limit = problem.budget.limit_bytes
    lines = (
        "# The best measured configuration of a search; `qratk fit --config best.yaml` trains it.",
        f"# score: {best.score!r} after {best.steps} steps",
        f"# bytes: {used} ({format_bytes(used)}, {problem.budget.scope}) of {limit} ({format_bytes(limit)})",
        f"# average bits: {problem.memory.average_bits(best.configuration):.4g}, "
        f"average rank: {problem.memory.average_rank(best.configuration):.4g}",
    )
    return "\n".join(lines) + "\n" + yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True, width=1000)


def evaluation_data(problem: Problem, evaluation: Evaluation) -> dict[str, Any]:
    """One evaluation as plain data; `bytes` are those of the budget's scope."""
    configuration = evaluation.configuration
    return {
        "configuration": str(configuration),
        "digest": configuration.digest,
        "steps": evaluation.steps,
        "score": evaluation.score,
        "bytes": budget_bytes(problem, evaluation),
        "fits": problem.fits(evaluation),
        "storage_bytes": evaluation.footprint.storage_bytes,
        "training_bytes": evaluation.footprint.training_bytes,
        "serving_bytes": evaluation.footprint.serving_bytes,
        "fixed_bytes": evaluation.footprint.fixed,
        "average_bits": problem.memory.average_bits(configuration),
        "average_rank": problem.memory.average_rank(configuration),
        "seconds": evaluation.seconds,
        "status": evaluation.status,
        "reason": clean(evaluation.reason),
        "checkpoint": evaluation.checkpoint,
    }


def front_data(plan: SearchPlan, front: ParetoFront) -> dict[str, Any]:
    """The measured front as plain data, by ascending bytes."""
    return {
        "scope": front.scope,
        "limit_bytes": plan.problem.budget.limit_bytes,
        "steps": plan.ladder.highest,
        "evaluations": [evaluation_data(plan.problem, e) for e in front.evaluations],
    }


def _comparison_data(problem: Problem, comparison: Comparison) -> dict[str, Any]:
    return {
        "baseline": evaluation_data(problem, comparison.baseline),
        "difference": comparison.difference,
        "low": comparison.low,
        "high": comparison.high,
        "confidence": comparison.confidence,
    }


def _quality_data(quality: SurrogateQuality | None) -> dict[str, Any] | None:
    if quality is None:
        return None
    return {
        "pairs": quality.pairs,
        "spearman": quality.spearman,
        "pearson": quality.pearson,
        "low_fidelity_spearman": quality.low_fidelity_spearman,
    }


def _generation_data(summary: GenerationSummary) -> dict[str, Any]:
    return {
        "generation": summary.number,
        "hypervolume": summary.hypervolume,
        "relative_progress": summary.relative_progress,
        "front_size": len(summary.front),
        "best_score": None if summary.best is None else summary.best.score,
        "surrogate": _quality_data(summary.surrogate),
        "surrogate_used": summary.surrogate_used,
        "seconds": summary.seconds,
    }


def _refinement_data(summary: RefinementSummary) -> dict[str, Any]:
    return {
        "step": summary.number,
        "best_score": None if summary.best is None else summary.best.score,
        "improved": summary.improved,
        "diagnostics": dict(summary.diagnostics),
        "seconds": summary.seconds,
    }


def result_data(result: SearchResult) -> dict[str, Any]:
    """All of `result.json` as plain data."""
    plan, problem = result.plan, result.plan.problem
    failed = [r for r in result.records if not r.evaluation.ok]
    return {
        "name": clean(plan.name),
        "best": evaluation_data(problem, result.best),
        "baselines": [evaluation_data(problem, e) for e in result.baselines],
        "references": [evaluation_data(problem, e) for e in result.references],
        "comparisons": [_comparison_data(problem, c) for c in result.comparisons],
        "test_scores": result.test_scores,
        "front": front_data(plan, result.front),
        "stop_reasons": {phase: clean(reason) for phase, reason in result.stop_reasons.items()},
        "hypervolume_by_generation": [summary.hypervolume for summary in result.generations],
        "generations": [_generation_data(summary) for summary in result.generations],
        "refinements": [_refinement_data(summary) for summary in result.refinements],
        "evaluations_by_rung": evaluations_by_rung(result),
        "failed_evaluations": len(failed),
        "item_weights": result.item_weights,
        "top3_hit_rates": result.top3_hit_rates,
        "proposals": result.proposals,
        "seconds": result.seconds,
        "utility": {
            "alpha": result.utility.alpha,
            "scores": result.utility.scores,
            "bytes": result.utility.bytes,
            "scope": result.utility.scope,
            "best": result.utility.of(result.best),
        },
        "problem": _problem_data(plan),
        "environment": environment(),
    }


def evaluations_by_rung(result: SearchResult) -> dict[int, int]:
    """Number of evaluations, failed ones too, at each rung of the ladder."""
    counts = Counter(evaluation.steps for evaluation in result.history)
    return {steps: counts[steps] for steps in sorted({*result.plan.ladder.steps, *counts})}


def _problem_data(plan: SearchPlan) -> dict[str, Any]:
    problem = plan.problem
    return {
        "layers": list(problem.space.layer_names),
        "bits": problem.space.bits,
        "ranks": problem.space.ranks,
        "log10_configurations": problem.space.log10_size,
        "limit_bytes": problem.budget.limit_bytes,
        "scope": problem.budget.scope,
        "max_average_bits": problem.budget.max_average_bits,
        "fixed_bytes": problem.memory.fixed_bytes,
        "importance": {"bits": problem.importance.bits, "rank": problem.importance.rank},
        "steps": plan.ladder.steps,
        "reduction_factor": plan.ladder.reduction_factor,
        "resumed": plan.resumed,
    }


def environment() -> dict[str, Any]:
    """What ran the search: library versions, interpreter, platform, and torch's threads and device if it is loaded."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "libraries": _versions(),
    }
    torch = sys.modules.get("torch")  # not imported for this: a search without torch stays without it
    if torch is not None:
        found["torch_threads"] = torch.get_num_threads()
        found["device"] = torch.cuda.get_device_name() if torch.cuda.is_initialized() else "cpu"
    return found


def _versions() -> dict[str, str]:
    import qratk

    versions = {"qratk": getattr(qratk, "__version__", "unknown")}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def to_json(value: Any) -> str:
    """Strict JSON: figures that are not finite become null."""
    return json.dumps(_plain(value), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item") and not isinstance(value, str):  # a numpy scalar
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)
