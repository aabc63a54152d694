"""Pictures of a search: the front, the layer-by-layer allocation, the best so far. Matplotlib without global state."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qratk.core.configuration import Configuration
from qratk.core.evaluation import Evaluation
from qratk.core.memory import Budget
from qratk.core.pareto import ParetoFront
from qratk.core.problem import Importance
from qratk.core.result import Record, SearchResult
from qratk.reporting._text import label, short_names
from qratk.reporting.tracker import Tracker

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart with any common colour vision, and by lightness in grey print.
BLUE, ORANGE, GREEN, RED, SKY, BLACK, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#000000", "#8A8A8A",
)  # fmt: skip
MIB = 2**20
DPI = 150
_MARKERS = ("o", "s", "^", "D", "v")


@dataclass(frozen=True)
class FrontParts:
    """What the picture of a front shows; all evaluations are of the highest rung."""

    measured: tuple[Evaluation, ...]
    front: ParetoFront
    budget: Budget
    baselines: tuple[Evaluation, ...] = ()
    references: tuple[Evaluation, ...] = ()
    best: Evaluation | None = None

    @classmethod
    def of_result(cls, result: SearchResult) -> FrontParts:
        """The parts of a search that has ended."""
        measured = result.history.at(result.plan.ladder.highest)
        budget = result.plan.problem.budget
        return cls(measured, result.front, budget, result.baselines, result.references, result.best)

    @classmethod
    def of_tracker(cls, tracker: Tracker) -> FrontParts:
        """The parts of a search that runs."""
        budget = tracker.plan.problem.budget
        return cls(tuple(tracker.measured), tracker.front, budget, tuple(tracker.baselines), (), tracker.best)


def front_figure(source: SearchResult | FrontParts) -> Figure:
    """Score against bytes of all that was measured at T_S: front, uniform baselines, best, budget."""
    parts = FrontParts.of_result(source) if isinstance(source, SearchResult) else source
    figure, axes = _new(7.0, 4.4)
    special = {e.configuration for e in (*parts.baselines, *parts.references)}
    plain = [e for e in parts.measured if e.configuration not in special]
    _points(axes, parts, plain, label="measured", marker="o", color=SKY, s=26, alpha=0.8, linewidths=0)
    _front_line(axes, parts)
    _points(axes, parts, parts.baselines, label="uniform", marker="s", s=34, facecolors="white", edgecolors=BLACK)
    _points(axes, parts, parts.references, label="reference", marker="^", s=40, facecolors="white", edgecolors=GREY)
    if parts.best is not None:
        _points(axes, parts, [parts.best], label="best", marker="*", s=230, color=RED, edgecolors="white", zorder=6)
    limit = parts.budget.limit_bytes / MIB
    axes.axvline(limit, color=GREY, linestyle="--", linewidth=1, label="budget")
    axes.set_xlabel(f"{parts.budget.scope} bytes (MiB)")
    axes.set_ylabel("validation score")
    axes.margins(0.07, 0.1)
    _annotate(axes, parts)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, borderaxespad=0.0)
    return figure


def _coordinates(parts: FrontParts, evaluations: Sequence[Evaluation]) -> tuple[list[float], list[float]]:
    done = [e for e in evaluations if e.ok]
    return [e.footprint.bytes(parts.budget.scope) / MIB for e in done], [e.score for e in done]


def _points(axes: Axes, parts: FrontParts, evaluations: Sequence[Evaluation], **style: Any) -> None:
    x, y = _coordinates(parts, evaluations)
    if x:
        axes.scatter(x, y, **{"zorder": 3, **style})


def _front_line(axes: Axes, parts: FrontParts) -> None:
    x, y = _coordinates(parts, parts.front.evaluations)
    if x:
        axes.step(x, y, where="post", color=BLUE, linewidth=1.6, marker="o", markersize=4.5, label="front", zorder=4)


def _annotate(axes: Axes, parts: FrontParts) -> None:
    for evaluation in (*parts.baselines, *parts.references):
        if evaluation.ok:
            x, y = _coordinates(parts, [evaluation])
            axes.annotate(label(evaluation.configuration), (x[0], y[0]), xytext=(0, -5), textcoords="offset points",
                          ha="center", va="top", fontsize=7.5, color="#303030", zorder=5)  # fmt: skip


def allocation_figure(
    configuration: Configuration, layer_names: Sequence[str], *, importance: Importance | None = None
) -> Figure:
    """Bits and ranks of every layer in two aligned rows, their correlation in the title.

    With an importance, its normalised scores are drawn as dots on a second axis of each row.
    """
    if len(layer_names) != len(configuration):
        raise ValueError(f"{len(configuration)} layer names are needed, got {len(layer_names)}")
    figure, (top, bottom) = _new(min(14.0, max(7.0, 2.0 + 0.14 * len(configuration))), 4.4, rows=2)
    bits, ranks = np.array(configuration.bits), np.array(configuration.ranks)
    scores = (None, None) if importance is None else (importance.normalised("bits"), importance.normalised("rank"))
    _bars(top, bits, BLUE, "bits", scores[0])
    _bars(bottom, ranks, ORANGE, "adapter rank", scores[1])
    _layer_ticks(bottom, short_names(layer_names))
    top.set_title(f"bits and ranks by layer ({_correlation(bits, ranks)})", fontsize=10)
    return figure


def _bars(axes: Axes, values: NDArray[np.int64], color: str, name: str, scores: NDArray[np.float64] | None) -> None:
    positions = np.arange(len(values))
    axes.bar(positions, values, width=0.85, color=color, label=name)
    axes.set_ylabel(name)
    axes.set_yticks(sorted({0, *(int(v) for v in values)}))
    axes.set_ylim(0, max(1, int(values.max())) * 1.08)
    axes.grid(axis="x", visible=False)
    if scores is not None:
        twin = axes.twinx()
        twin.plot(positions, scores, color=BLACK, marker=".", markersize=5, linewidth=0.7)
        twin.set_ylim(0, 1.08)
        twin.set_ylabel("importance")
        twin.grid(visible=False)


def _layer_ticks(axes: Axes, names: Sequence[str]) -> None:
    stride = max(1, -(-len(names) // 40))
    positions = range(0, len(names), stride)
    longest = max(len(names[i]) for i in positions)
    axes.set_xticks(list(positions), [names[i] for i in positions], rotation=0 if longest <= 3 else 90, fontsize=7.5)
    axes.set_xlim(-0.7, len(names) - 0.3)
    axes.set_xlabel("layer")


def _correlation(bits: NDArray[np.int64], ranks: NDArray[np.int64]) -> str:
    if bits.std() == 0 or ranks.std() == 0:
        return "no correlation: one of them is the same everywhere"
    return f"Pearson correlation {np.corrcoef(bits, ranks)[0, 1]:+.2f}"


def progress_figure(records: Sequence[Record], steps: int, *, baseline: Evaluation | None = None) -> Figure:
    """Scores of all rungs and the best so far at `steps` (T_S), against the number of evaluations."""
    figure, axes = _new(7.0, 4.0)
    rungs = sorted({r.evaluation.steps for r in records})
    shades = np.linspace(0.75, 0.35, max(1, len(rungs)))
    for number, rung in enumerate(rungs):
        done = [(r.index + 1, r.evaluation.score) for r in records if r.evaluation.steps == rung and r.evaluation.ok]
        style = {"color": SKY if rung == steps else str(shades[number]), "marker": _MARKERS[number % len(_MARKERS)]}
        if done:
            axes.scatter(*zip(*done, strict=True), s=20, linewidths=0, label=f"{rung} steps", **style)
    x, y = _best_so_far(records, steps)
    if x:
        axes.step(x, y, where="post", color=RED, linewidth=1.6, label="best so far", zorder=4)
    if baseline is not None:
        axes.axhline(baseline.score, color=BLACK, linestyle=":", linewidth=1,
                     label=f"best uniform ({label(baseline.configuration)})")  # fmt: skip
    axes.set_xlabel("evaluations")
    axes.set_ylabel("validation score")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, borderaxespad=0.0)
    return figure


def _best_so_far(records: Sequence[Record], steps: int) -> tuple[list[int], list[float]]:
    x: list[int] = []
    y: list[float] = []
    for record in records:
        evaluation = record.evaluation
        if evaluation.ok and evaluation.steps == steps and record.candidate.phase != "reference":
            x.append(record.index + 1)
            y.append(max(evaluation.score, y[-1] if y else evaluation.score))
    if x:
        x.append(records[-1].index + 1)
        y.append(y[-1])
    return x, y


def _new(width: float, height: float, *, rows: int = 1) -> tuple[Figure, Any]:
    # Figure and canvas without pyplot, whose figures live in a global list and leak.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 1, sharex=True)
    for one in np.atleast_1d(axes):
        one.spines[["top", "right"]].set_visible(False)
        one.grid(color="#DDDDDD", linewidth=0.6)
        one.set_axisbelow(True)
    return figure, axes


def to_png(figure: Figure) -> bytes:
    """The picture as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def to_array(figure: Figure) -> NDArray[np.uint8]:
    """The picture as RGB, (height, width, 3)."""
    canvas: Any = figure.canvas
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()
