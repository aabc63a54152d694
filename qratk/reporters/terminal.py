"""The terminal: a live view where there is one, plain lines elsewhere, a summary table at the end."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, final

import numpy as np

from qratk.core.configuration import Configuration
from qratk.core.evaluation import Evaluation
from qratk.core.memory import format_bytes
from qratk.core.problem import Problem
from qratk.core.result import (
    Comparison,
    Confirmed,
    GenerationSummary,
    Progress,
    Record,
    RefinementSummary,
    SearchPlan,
    SearchResult,
)
from qratk.core.shared import Setting, setting_text, shared_text
from qratk.core.text import clean, duration, full_label
from qratk.core.work import Work
from qratk.reporters.base import Destination, Reporter, reporters
from qratk.reporters.tracker import Tracker, budget_bytes
from qratk.reporters.working import WorkLines, work_text
from qratk.run import files

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

_LEVELS = "▁▂▃▄▅▆▇█"
_ASCII_LEVELS = ".:-=+*#@"
_MAX_STRIP_ROWS = 3
_MESSAGES = 3
_LONG = 200
_FIGURES = 6


@final
@reporters.register("terminal")
class TerminalReporter(Reporter):
    """Live view on a terminal, else one line an event without control codes; a summary at the end.

    Args:
        plain: lines instead of the live view; by default when the output is not a terminal that can move its cursor.
    """

    speaks = True

    def __init__(self, plain: bool | None = None) -> None:
        self._stream: TextIO = sys.stdout
        self._plain = plain
        self._run_dir: Path | None = None
        self._view = LiveView()
        self._live: Live | None = None
        self._console: Console | None = None
        self._work: WorkLines | None = None  # while there is no live view
        self._stage: tuple[object, ...] = ()
        self._replayed = True

    @classmethod
    def to(cls, stream: TextIO, plain: bool | None = None) -> TerminalReporter:
        """Reporter that writes to a stream instead of standard output."""
        made = cls(plain)
        made._stream = stream
        return made

    def open(self, destination: Destination) -> None:
        self._run_dir = destination.run_dir
        self._prepare()

    def started(self, plan: SearchPlan) -> None:
        self._prepare().clear()
        self._view.start(plan)
        self._replayed = plan.resumed == 0
        if self._plain:
            for line in plan_lines(plan):
                self._line(line)
        else:
            self._open()

    def message(self, text: str) -> None:
        text = clean(text)
        self._view.messages.append(text)
        if self._work is not None:
            self._work.clear()
        if self._plain or self._live is None:
            self._line(text)

    def working(self, work: Work) -> None:
        if self._live is not None:
            self._view.work = None if work.over else work
        else:
            self._prepare()(work)

    def progress(self, progress: Progress) -> None:
        self._view.take(progress)
        stage = (progress.phase, progress.generation, progress.rung)
        if self._plain and stage != self._stage and not self._view.replaying:
            self._line(
                f"{_stage_text(progress)}: {progress.done}/{progress.planned} evaluations done, "
                f"at most {duration(progress.seconds_left)} left"
            )
        self._stage = stage

    def evaluated(self, record: Record, progress: Progress) -> None:
        self._view.record(record, progress)
        if not self._plain:
            if not record.evaluation.ok:
                self._view.messages.append(_failure(record))
        elif self._replayed:
            self._line(self._view.evaluation_line(record, progress))
        if not self._replayed and not self._view.replaying:
            self._replayed = True
            self.message(f"{record.index + 1} evaluations of the earlier run were taken over")

    def generation(self, summary: GenerationSummary) -> None:
        self._view.summary = summary
        self._view.hear(summary.best)
        if self._plain and not self._view.replaying:
            self._line(_generation_line(summary))

    def refinement(self, summary: RefinementSummary) -> None:
        self._view.step = summary
        self._view.hear(summary.best)
        if self._plain and not self._view.replaying:
            self._line(_refinement_line(summary))

    def finished(self, result: SearchResult) -> None:
        self._view.hear(result.best)
        self._stop(keep=False)
        if self._plain:
            for line in summary_lines(result, run_dir=self._run_dir):
                self._line(line)
        elif self._console is not None:
            self._console.print(Summary(result, run_dir=self._run_dir))

    def close(self) -> None:
        """Give the terminal back; after an error the last view stays to be read."""
        self._stop(keep=True)

    def _prepare(self) -> WorkLines:
        """Look at the stream, once; what shows work while there is no live view."""
        if self._work is None:
            self._console = _console(self._stream)
            if self._plain is None:
                # Not `console.is_terminal`: FORCE_COLOR would turn a log file into one.
                self._plain = not self._stream.isatty() or self._console.is_dumb_terminal
            self._work = WorkLines(self._stream, overwriting=not self._plain)
        return self._work

    def _open(self) -> None:
        from rich.live import Live

        live = Live(self._view, console=self._console, refresh_per_second=2, vertical_overflow="crop")
        live.start()
        self._live = live

    def _stop(self, *, keep: bool) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.transient = not keep
            live.stop()

    def _line(self, text: str) -> None:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._stream.write(text.encode(encoding, "replace").decode(encoding) + "\n")
        self._stream.flush()


class LiveView:
    """What the live view shows; rich renders it again and again from a thread of its own."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._tracker: Tracker | None = None
        self._progress: Progress | None = None
        self._heard_at = clock()
        self.summary: GenerationSummary | None = None
        self.step: RefinementSummary | None = None
        self.work: Work | None = None
        self.messages: deque[str] = deque(maxlen=_MESSAGES)

    @property
    def replaying(self) -> bool:
        """Whether the records are still those of an earlier run."""
        return self._tracker is not None and self._tracker.replaying

    def start(self, plan: SearchPlan) -> None:
        """Begin to show a search."""
        self._tracker = Tracker(plan)
        self._heard_at = self._clock()

    def take(self, progress: Progress) -> None:
        """Show a new standing."""
        self._progress = progress
        self._heard_at = self._clock()
        self.hear(progress.best)

    def record(self, record: Record, progress: Progress) -> None:
        """Take in a measured evaluation."""
        if self._tracker is not None:
            self._tracker.add(record, progress)
        self.take(progress)

    def hear(self, best: Evaluation | None) -> None:
        """Show another best."""
        if self._tracker is not None:
            self._tracker.hear(best)

    def evaluation_line(self, record: Record, progress: Progress) -> str:
        """The plain line of an evaluation."""
        assert self._tracker is not None
        problem, best = self._tracker.plan.problem, self._tracker.best
        words = [f"[{duration(progress.seconds)}] {progress.done}/{progress.planned}", _stage_text(progress) + ":"]
        if record.evaluation.ok:
            words.append(f"score {_score(record.evaluation.score)}, {_short_size(problem, record.evaluation)},")
            words.append(duration(record.evaluation.seconds))
        else:
            words.append(_failure(record))
        words.append(f"| best {_score(best.score)}, {_short_size(problem, best)}" if best else "| no best yet")
        if progress.seconds_left is not None:
            words.append(f"| at most {duration(progress.seconds_left)} left")
        return " ".join(words)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.console import Group
        from rich.panel import Panel
        from rich.text import Text

        tracker = self._tracker
        if tracker is None:
            return
        ascii_only = options.ascii_only
        inner = options.max_width - 4
        body: list[RenderableType] = [Text(line, style="dim") for line in plan_lines(tracker.plan)[1:]]
        body.append(self._table(tracker, inner, ascii_only))
        if tracker.best is not None:
            body.append(strip(tracker.plan.problem, tracker.best.configuration, inner, ascii_only=ascii_only))
        body += [Text(f"- {text}", style="yellow", no_wrap=True, overflow="ellipsis") for text in tuple(self.messages)]
        yield Panel(Group(*body), title=Text(f"qratk search: {clean(tracker.plan.name)}"), title_align="left")

    def _table(self, tracker: Tracker, width: int, ascii_only: bool) -> Table:
        from rich.table import Table

        table = Table.grid(padding=(0, 2), expand=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in self._rows(tracker, min(30, width // 3), ascii_only):
            table.add_row(name, value)
        return table

    def _rows(self, tracker: Tracker, bar: int, ascii_only: bool) -> Iterator[tuple[str, Text]]:
        from rich.text import Text

        problem, progress, best = tracker.plan.problem, self._progress, tracker.best
        if progress is not None:
            yield "stage", Text(_stage_text(progress) + _rung_of(tracker.plan, progress))
            share = progress.done / max(1, progress.planned)
            yield "evaluations", _bar(share, bar, "cyan", ascii_only).append(f" {progress.done}/{progress.planned}")
        if self.work is not None:
            yield "now", Text(work_text(self.work))
        if best is None:
            yield "best", Text(f"none yet: nothing was measured after {tracker.plan.ladder.highest} steps")
        else:
            memory = problem.memory
            yield (
                "best",
                Text(_score(best.score), style="bold green").append(
                    f"  ({memory.average_bits(best.configuration):.2f} bits, "
                    f"rank {memory.average_rank(best.configuration):.1f} on average)",
                    style="default not bold",
                ),
            )
            share = budget_bytes(problem, best) / problem.budget.limit_bytes
            used, limit = format_bytes(budget_bytes(problem, best)), format_bytes(problem.budget.limit_bytes)
            yield "bytes", _bar(share, bar, "magenta", ascii_only).append(f" {used} of {limit} ({share:.1%})")
        uniform = tracker.best_baseline
        if uniform is not None:
            gain = "" if best is None else f", best {best.score - uniform.score:+.4f}"
            yield "best uniform", Text(f"{_score(uniform.score)}  ({full_label(uniform.configuration)}){gain}")
        if self.summary is not None:
            text = f"{self.summary.hypervolume:.4g}  ({_growth(self.summary)} in generation "
            yield "hypervolume", Text(f"{text}{self.summary.number})")
        if self.step is not None and self.step.diagnostics:
            yield "refinement", Text(_diagnostics(self.step))
        yield "time", Text(self._times())

    def _times(self) -> str:
        since = self._clock() - self._heard_at
        if self._progress is None:
            return f"{duration(since)} elapsed"
        left = self._progress.seconds_left
        shown = "-" if left is None else duration(max(0.0, left - since))
        return f"{duration(self._progress.seconds + since)} elapsed, at most {shown} left"


def plan_lines(plan: SearchPlan) -> list[str]:
    """What is known before the search, in a few lines; the first names it."""
    problem, space, budget = plan.problem, plan.problem.space, plan.problem.budget
    cap = "" if budget.max_average_bits is None else f", at most {budget.max_average_bits:g} bits on average"
    rungs = ", ".join(f"{plan.evaluations.get(steps, 0)} at {steps} steps" for steps in plan.ladder.steps)
    shared = "".join(f", {ladder.name} {_ladder(ladder.values)}" for ladder in space.shared)
    lines = [
        f"search {clean(plan.name)}",
        f"{problem.num_layers} layers, bits {_ladder(space.bits)}, ranks {_ladder(space.ranks)}{shared}: "
        f"{_count(space.log10_size)} configurations",
        f"budget {format_bytes(budget.limit_bytes)} ({budget.scope}{cap}); evaluations at most: {rungs}",
    ]
    if plan.resumed:
        lines.append(f"resumed: {plan.resumed} evaluations are known already")
    return lines


def _ladder(values: Sequence[Setting]) -> str:
    return "/".join(setting_text(value) for value in values)


def _count(log10: float) -> str:
    return f"{round(10**log10)}" if log10 < 6 else f"10^{log10:.1f}"


def strip(problem: Problem, configuration: Configuration, width: int, *, ascii_only: bool = False) -> Text:
    """Bits and ranks of every layer as rows of marks that grow with the rung.

    Layers that do not fit into a few rows are drawn several to a mark, at their mean rung, and the legend says so.
    """
    from rich.text import Text

    space = problem.space
    margin = 11
    columns = max(10, width - margin)
    group = -(-len(configuration) // (columns * _MAX_STRIP_ROWS))
    bits = _marks(configuration.bits, space.bits, group, ascii_only)
    ranks = _marks(configuration.ranks, space.ranks, group, ascii_only)
    text = Text(no_wrap=True)
    for start in range(0, len(bits), columns):
        for name, marks, style in (("bits", bits, "blue"), ("ranks", ranks, "yellow")):
            text.append(f"{name:<6}", style="bold").append(f"{start * group:>4} ", style="dim")
            text.append(marks[start : start + columns] + "\n", style=style)
    legend = f"{_legend('bits', space.bits, ascii_only)}  {_legend('rank', space.ranks, ascii_only)}"
    text.append(legend + (f"  (a mark: {group} layers)" if group > 1 else ""), style="dim")
    return text


def _level(rung: float, rungs: int, ascii_only: bool) -> str:
    levels = _ASCII_LEVELS if ascii_only else _LEVELS
    return levels[round(rung / max(1, rungs - 1) * (len(levels) - 1))]


def _marks(values: Sequence[int], ladder: Sequence[int], group: int, ascii_only: bool) -> str:
    # A reference may lie off the ladder: it is drawn between its neighbours, or at the end.
    rungs = np.interp(values, ladder, np.arange(len(ladder)))
    chunks = [rungs[i : i + group] for i in range(0, len(rungs), group)]
    return "".join(_level(float(chunk.mean()), len(ladder), ascii_only) for chunk in chunks)


def _legend(name: str, ladder: Sequence[int], ascii_only: bool) -> str:
    return name + " " + " ".join(f"{v}{_level(i, len(ladder), ascii_only)}" for i, v in enumerate(ladder))


def _bar(share: float, width: int, style: str, ascii_only: bool) -> Text:
    from rich.text import Text

    filled = round(min(1.0, max(0.0, share)) * width)
    full, empty = ("#", ".") if ascii_only else ("━", "─")
    return Text(full * filled, style=style).append(empty * (width - filled), style="dim")


def _stage_text(progress: Progress) -> str:
    unit = {"global": "generation", "local": "step", "tuning": "round", "confirmation": "seed"}.get(progress.phase, "")
    number = f" {progress.generation}" if unit else ""
    return f"{progress.phase}{' ' + unit if unit else ''}{number}, {progress.rung} steps"


def _rung_of(plan: SearchPlan, progress: Progress) -> str:
    steps = plan.ladder.steps
    return f" (rung {steps.index(progress.rung) + 1} of {len(steps)})" if progress.rung in steps else ""


def _score(score: float) -> str:
    return f"{score:.4f}" if abs(score) < 1000 else f"{score:.6g}"


def _size(problem: Problem, evaluation: Evaluation) -> str:
    used = budget_bytes(problem, evaluation)
    return f"{format_bytes(used)} ({used / problem.budget.limit_bytes:.1%} of the budget)"


def _failure(record: Record) -> str:
    return f"evaluation {record.index + 1} failed: {clean(record.evaluation.reason) or 'no reason given'}"


def _diagnostics(summary: RefinementSummary) -> str:
    figures = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in summary.diagnostics.items())
    return f"step {summary.number}: {figures or 'no diagnostics'}"


def _growth(summary: GenerationSummary) -> str:
    return f"{summary.relative_progress:+.2%}" if math.isfinite(summary.relative_progress) else "first"


def _generation_line(summary: GenerationSummary) -> str:
    best = "no best yet" if summary.best is None else f"best {_score(summary.best.score)}"
    guide = "surrogate" if summary.surrogate_used else "low-fidelity score"
    return (
        f"generation {summary.number} done: {best}, hypervolume {summary.hypervolume:.4g} "
        f"({_growth(summary)}), front of {len(summary.front)}, promoted by {guide}, "
        f"{duration(summary.seconds)}"
    )


def _refinement_line(summary: RefinementSummary) -> str:
    best = "no best yet" if summary.best is None else f"best {_score(summary.best.score)}"
    change = "improved" if summary.improved else "not improved"
    return f"refinement {_diagnostics(summary)}; {change}, {best}, {duration(summary.seconds)}"


def _outcome_rows(result: SearchResult) -> Iterator[tuple[str, str, str, str, str, str]]:
    """Rows of (what, configuration, score, bytes of the budget, average bits and rank, difference of the best).

    The score is that of the run that the search decided by, and behind it the mean of fresh seeds where there are any.
    """
    means = {
        c.configuration: f"; {_score(c.mean)} over {len(c.scores)} seeds" for c in result.confirmations if c.scores
    }
    compared = {c.baseline.configuration: c for c in result.comparisons}
    groups = (
        ("best", (result.best,)),
        ("uniform", result.baselines),
        ("reference", result.references),
    )
    memory = result.plan.problem.memory
    for kind, evaluations in groups:
        for e in sorted(evaluations, key=lambda e: -e.score):
            averages = f"{memory.average_bits(e.configuration):.2f} / {memory.average_rank(e.configuration):.1f}"
            comparison = compared.get(e.configuration)
            yield (
                kind,
                full_label(e.configuration),
                (_score(e.score) if e.ok else "failed") + means.get(e.configuration, ""),
                _short_size(result.plan.problem, e),
                averages,
                _interval(comparison) if comparison is not None and kind != "best" else "",
            )


def _confirmed_text(confirmed: Confirmed) -> str:
    count, selected = len(confirmed.scores), f"it was selected by {_score(confirmed.selected.score)}"
    if not math.isfinite(confirmed.mean):
        failed = next((e.reason for e in confirmed.replicates if not e.ok), "no reason given")
        return f"{count} of {len(confirmed.replicates)} fresh seeds: {clean(failed)}; {selected}"
    known = math.isfinite(confirmed.low)
    bounds = (
        f", {confirmed.confidence:.0%} interval [{_score(confirmed.low)}, {_score(confirmed.high)}]" if known else ""
    )
    return f"{_score(confirmed.mean)} over {count} fresh seed{'s' * (count > 1)}{bounds}; {selected}"


def _short_size(problem: Problem, evaluation: Evaluation) -> str:
    used = budget_bytes(problem, evaluation)
    return f"{format_bytes(used)} ({used / problem.budget.limit_bytes:.1%})"


def _interval(comparison: Comparison) -> str:
    over = " over seeds" if comparison.over == "seeds" else ""
    return f"{comparison.difference:+.4f} [{comparison.low:+.4f}, {comparison.high:+.4f}]{over}"


def _first(figures: Mapping[str, float]) -> str:
    """The first figures by name, for there may be a dozen; of several tasks the score, and what each adds to it."""
    of_tasks = [name for name in figures if name.endswith("/score")]
    names = [name for name in figures if name == "score" or name in of_tasks] if of_tasks else [*figures][:_FIGURES]
    shown = [f"{clean(name)} {_score(figures[name])}" for name in names]
    more = len(figures) - len(shown)
    return ", ".join(shown) + (f"; {more} more in {files.RESULT}" if more else "")


def _facts(result: SearchResult, run_dir: Path | None) -> Iterator[tuple[str, str]]:
    best, problem = result.best, result.plan.problem
    yield "best configuration", str(best.configuration)
    if best.configuration.shared:
        yield "shared settings", shared_text(best.configuration.shared)
    yield "best score", f"{_score(best.score)} at {_size(problem, best)}"
    if result.single is not None:
        yield (
            "averaged",
            f"the adapters of {len(best.merged)} trainings; the best of them alone has {_score(result.single.score)}",
        )
    if result.confirmed is not None:
        yield "confirmed score", _confirmed_text(result.confirmed)
    for other in result.confirmations:
        if other is not result.confirmed:
            yield f"behind it, {full_label(other.configuration)}", _confirmed_text(other)
    if best.figures:
        yield "best figures", _first(best.figures)
    uniform = [c for c in result.comparisons if c.baseline in result.baselines]
    top = max(uniform, key=lambda c: c.baseline.score, default=None)
    if top is not None:
        sure = ", which excludes 0" if top.low > 0 or top.high < 0 else ""
        over = " over seeds" if top.over == "seeds" else ""
        yield (
            f"best minus the best uniform, {full_label(top.baseline.configuration)}",
            f"{top.difference:+.4f}, {top.confidence:.0%} interval{over} [{top.low:+.4f}, {top.high:+.4f}]{sure}",
        )
    for name, scores in result.test_scores.items():
        yield f"test, {clean(name)}", _first(scores)
    for phase, reason in result.stop_reasons.items():
        yield f"stopped, {clean(phase)}", clean(reason)
    counts = {
        steps: sum(e.steps == steps for e in result.history)
        for steps in sorted({*result.plan.ladder.steps, *(e.steps for e in result.history)})
    }
    failed = sum(not e.ok for e in result.history)
    yield (
        "evaluations",
        ", ".join(f"{n} at {steps} steps" for steps, n in counts.items()) + (f"; {failed} failed" if failed else ""),
    )
    if result.generations:
        yield "hypervolume", f"{result.generations[-1].hypervolume:.4g} after {len(result.generations)} generations"
    if result.seconds:
        yield "time", ", ".join(f"{clean(stage)} {duration(seconds)}" for stage, seconds in result.seconds.items())
    if run_dir is not None:
        yield f"files in {run_dir}", ", ".join(name for name in files.ALL if (run_dir / name).exists()) or "none"


_HEADS = ("", "configuration", "score", "bytes (of the budget)", "bits / rank", "best minus it [interval]")


class Summary:
    """The end of a search for rich: best, baselines and references as a table, then facts."""

    def __init__(self, result: SearchResult, *, run_dir: Path | None = None) -> None:
        self._result = result
        self._run_dir = run_dir

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table
        from rich.text import Text

        wide = options.max_width >= 110
        table = Table(title=Text(f"search {clean(self._result.plan.name)}"), title_justify="left")
        for head in _HEADS if wide else ("", "configuration", "score", "budget", "best - it"):
            table.add_column(head, overflow="fold")
        for row in _outcome_rows(self._result):
            style = "bold green" if row[0] == "best" else ""
            table.add_row(*(Text(cell, style=style) for cell in (row if wide else _narrow(row))))
        yield table
        best, problem = self._result.best.configuration, self._result.plan.problem
        yield strip(problem, best, options.max_width, ascii_only=options.ascii_only)
        facts = Table.grid(padding=(0, 2))
        facts.add_column(style="bold", overflow="fold", max_width=max(16, options.max_width // 3))
        facts.add_column(overflow="fold")
        for name, value in _facts(self._result, self._run_dir):
            if name == "best configuration" and len(value) > _LONG:  # the strip shows it, best.yaml holds it
                continue
            facts.add_row(Text(name), Text(value))
        yield facts


def _narrow(row: Sequence[str]) -> tuple[str, ...]:
    """A row without averages and intervals; of the bytes only the share of the budget."""
    kind, name, score, size, _, difference = row
    return kind, name, score, size.partition("(")[2].rstrip(")"), difference.partition(" ")[0]


def summary_lines(result: SearchResult, *, run_dir: Path | None = None) -> list[str]:
    """The same as plain lines."""
    rows = [_HEADS, *_outcome_rows(result)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADS))]
    lines = ["", *("  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in rows), ""]
    return lines + [f"{name}: {value}" for name, value in _facts(result, run_dir)]


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    return Console(file=stream, highlight=False, markup=False, emoji=False)
