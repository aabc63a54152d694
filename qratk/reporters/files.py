"""The files of a run that other tools read: evaluations.csv, front.json, best.yaml, result.json."""

from __future__ import annotations

import contextlib
import csv
import io
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, final

import yaml

from qratk.core.errors import RunDirectoryError
from qratk.core.evaluation import Evaluation, seeds_of
from qratk.core.memory import format_bytes
from qratk.core.pareto import ParetoFront
from qratk.core.plain import plain
from qratk.core.problem import Problem
from qratk.core.result import (
    Confirmed,
    GenerationSummary,
    Progress,
    Record,
    RefinementSummary,
    SearchPlan,
    SearchResult,
)
from qratk.core.secrets import without_secrets
from qratk.core.shared import REPLICATE, setting_text, shared_text
from qratk.core.space import SearchSpace
from qratk.core.text import clean
from qratk.core.work import Work
from qratk.reporters.base import Destination, Reporter, reporters
from qratk.reporters.tracker import Tracker, budget_bytes
from qratk.run import files
from qratk.run.atomic import write_atomically
from qratk.run.document import FrontDocument, ResultDocument, to_json

COLUMNS: Final = (
    "phase", "generation", "origin", "bits", "ranks", "steps", "replicate", "score", "storage_bytes", "average_bits",
    "average_rank", "seconds", "status", "reason",
)  # fmt: skip
"""Columns of every `evaluations.csv`; behind them come the figures that the scoring said, by their names."""


@final
@reporters.register("files")
class RunFiles(Reporter):
    """Writes the files of a run directory; a kill at any moment leaves each of them well-formed.

    `evaluations.csv` grows by one row an evaluation, written in one call, and is replaced as a whole when a
    generation ends, or the first evaluation brings its figures; all other files are replaced atomically. `front.json`
    and `best.yaml` are refreshed after every generation and refinement step, so that an interrupted search leaves a
    usable best. While a resumed search replays its records, the files of the earlier run stay as they are.
    """

    essential = True

    def __init__(self) -> None:
        self._destination = Destination(Path())
        self._figures: tuple[str, ...] = ()
        self._tracker: Tracker | None = None
        self._pending = False

    @property
    def _folder(self) -> Path:
        return self._destination.run_dir

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files that exist by now."""
        names = (files.EVALUATIONS, files.FRONT, files.BEST, files.RESULT)
        return tuple(path for path in (self._folder / name for name in names) if path.exists())

    def open(self, destination: Destination) -> None:
        self._destination = destination

    def started(self, plan: SearchPlan) -> None:
        self._tracker = Tracker(plan)
        self._figures = ()
        self._pending = plan.resumed > 0
        with self._writing():
            self._folder.mkdir(parents=True, exist_ok=True)
            if not self._pending:
                self._write_table()

    def message(self, text: str) -> None:
        """Nothing: messages are for people."""

    def working(self, work: Work) -> None:
        """Nothing to write."""

    def progress(self, progress: Progress) -> None:
        """Nothing: only what was measured is written."""

    def evaluated(self, record: Record, progress: Progress) -> None:
        tracker = self._known()
        tracker.add(record, progress)
        known, self._figures = self._figures, _joined(self._figures, record.evaluation.figures)
        with self._writing():
            if self._pending:
                if not tracker.replaying:
                    self._refresh()
            elif self._figures != known:
                self._write_table()
            else:
                _append(self._folder / files.EVALUATIONS, self._line(record))

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
            self._write_best(result.best, result.confirmed)
            write_atomically(self._folder / files.RESULT, to_json(ResultDocument.of(result)))

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
        lines = [
            _csv_line((*columns(self._known().plan.problem.space), *self._figures)),
            *map(self._line, self._known().records),
        ]
        write_atomically(self._folder / files.EVALUATIONS, "".join(lines))

    def _line(self, record: Record) -> str:
        return _csv_line(evaluation_row(self._known().plan.problem, record, self._figures))

    def _write_front(self, front: ParetoFront) -> None:
        write_atomically(self._folder / files.FRONT, to_json(FrontDocument.of(self._known().plan, front)))

    def _write_best(self, best: Evaluation | None, confirmed: Confirmed | None = None) -> None:
        if best is not None:
            text = best_text(self._known().plan.problem, best, self._destination.fit_config, confirmed)
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


def _joined(known: Sequence[str], more: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*known, *more)))


def _csv_line(row: tuple[object, ...]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(row)
    return buffer.getvalue()


def columns(space: SearchSpace) -> tuple[str, ...]:
    """Columns of `evaluations.csv`: `COLUMNS`, and after the ranks one for each shared setting of the space.

    `replicate` numbers the seeds as `model.replicate` does, also where configurations have seeds of their own.
    """
    after = COLUMNS.index("ranks") + 1
    return (*COLUMNS[:after], *_shared_names(space), *COLUMNS[after:])


def _shared_names(space: SearchSpace) -> tuple[str, ...]:
    return tuple(ladder.name for ladder in space.shared if ladder.name != REPLICATE)


def evaluation_row(problem: Problem, record: Record, figures: Sequence[str] = ()) -> tuple[object, ...]:
    """One row of `evaluations.csv`, as `columns`, then the figures of these names, empty where there are none.

    Bits and ranks have blanks between; the score is empty if it failed.
    """
    candidate, evaluation = record.candidate, record.evaluation
    configuration = evaluation.configuration
    return (
        candidate.phase,
        candidate.generation,
        candidate.origin,
        " ".join(map(str, configuration.bits)),
        " ".join(map(str, configuration.ranks)),
        *(setting_text(configuration.settings.get(name, "")) for name in _shared_names(problem.space)),
        evaluation.steps,
        seeds_of(configuration, evaluation.replicate),
        evaluation.score if evaluation.ok else "",
        evaluation.footprint.storage_bytes,
        round(problem.memory.average_bits(configuration), 6),
        round(problem.memory.average_rank(configuration), 6),
        round(evaluation.seconds, 3),
        evaluation.status,
        clean(evaluation.reason),
        *(evaluation.figures.get(name, "") for name in figures),
    )


def best_text(
    problem: Problem, best: Evaluation, fit_config: Mapping[str, Any], confirmed: Confirmed | None = None
) -> str:
    """YAML of `fit_config` with the best's configuration, after comments that say what was measured of it.

    Its shared settings are written as what they are: options of the model.
    """
    config = without_secrets(fit_config)
    model = config["model"] = dict(config.get("model") or {})
    target = model
    if "class_path" in model:  # the other way to write a model in Lightning's YAML
        target = model["init_args"] = dict(model.get("init_args") or {})
    target.update(best.configuration.settings)
    if best.replicate:
        target[REPLICATE] = seeds_of(best.configuration, best.replicate)
    target["configuration"] = str(best.configuration.with_shared(()))
    used = budget_bytes(problem, best)
    limit = problem.budget.limit_bytes
    lines: tuple[str, ...] = (
        "# The best measured configuration of a search; `qratk fit --config best.yaml` trains it.",
        f"# score: {best.score!r} after {best.steps} steps",
        f"# bytes: {used} ({format_bytes(used)}, {problem.budget.scope}) of {limit} ({format_bytes(limit)})",
        f"# average bits: {problem.memory.average_bits(best.configuration):.4g}, "
        f"average rank: {problem.memory.average_rank(best.configuration):.4g}",
    )
    if confirmed is not None:
        lines = (
            *lines,
            f"# mean score over {len(confirmed.scores)} fresh seeds: {confirmed.mean!r}{_between(confirmed)}",
        )
    if best.replicate and not best.merged:
        lines = (
            *lines,
            f"# score is that of the best of these seeds, which training it again has: replicate "
            f"{seeds_of(best.configuration, best.replicate)}",
        )
    if best.merged:
        lines = (
            *lines,
            f"# score is that of {len(best.merged)} trainings averaged, whose adapter lies in {files.ADAPTER}/; this "
            "file trains the first of them",
        )
    if best.configuration.shared:
        lines = (*lines, f"# shared settings: {shared_text(best.configuration.shared)}")
    return "\n".join(lines) + "\n" + yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True, width=1000)


def _between(confirmed: Confirmed) -> str:
    if not math.isfinite(confirmed.low):
        return ""
    return f", {confirmed.confidence:.0%} interval [{confirmed.low:.6g}, {confirmed.high:.6g}] (Student's t)"
