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
from qratk.core.space import SearchSpace
from qratk.core.text import label, short_names
from qratk.reporters.tracker import Tracker

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

# Okabe and Ito's palette: told apart with any common colour vision, and by lightness in grey print.
BLUE, ORANGE, RED, SKY, BLACK, GREY, GREEN, PURPLE = (
    "#0072B2", "#E69F00", "#D55E00", "#56B4E9", "#000000", "#8A8A8A", "#009E73", "#CC79A7",
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
    """Score against bytes of all that was measured at T_S: front, uniform baselines, best, budget.

    A reference far over the budget is drawn as a level line, so that it does not squeeze the rest; where most
    measurements crowd in a corner, an inset enlarges it.
    """
    parts = FrontParts.of_result(source) if isinstance(source, SearchResult) else source
    crowd = _crowd(parts)
    figure, axes, corner = _front_axes(zoom=crowd is not None)
    far = [e for e in parts.references if e.ok and _mib(parts, e) > 1.2 * _right_edge(parts)]
    near = [e for e in parts.references if e.ok and e not in far]
    _draw_front(axes, parts, near)
    axes.set_xlabel(f"{parts.budget.scope} bytes (MiB)")
    axes.set_ylabel("validation score")
    axes.margins(0.08, 0.1)
    for evaluation in (*parts.baselines, *near):
        _name(axes, label(evaluation.configuration), _mib(parts, evaluation), evaluation.score)
    for evaluation in far:
        _level_line(axes, parts, evaluation)
    legend(axes, inside=corner is not None)
    if crowd is not None and corner is not None:
        _enlarge(axes, corner, parts, near, crowd)
    return figure


def _front_axes(*, zoom: bool) -> tuple[Figure, Axes, Axes | None]:
    """The figure, its axes, and narrower ones beside them if wanted."""
    if not zoom:
        return (*new_figure(7.0, 4.4), None)
    figure, (axes, corner) = new_figure(9.0, 4.4, columns=2)
    axes.get_subplotspec().get_gridspec().set_width_ratios((1.9, 1.0))
    return figure, axes, corner


def _draw_front(axes: Axes, parts: FrontParts, references: Sequence[Evaluation]) -> None:
    special = {e.configuration for e in (*parts.baselines, *parts.references)}
    plain = [e for e in parts.measured if e.configuration not in special]
    _points(axes, parts, plain, label="measured", marker="o", color=SKY, s=22, alpha=0.9, linewidths=0)
    _front_line(axes, parts)
    uniform = {"marker": "s", "s": 40, "linewidths": 1.2, "edgecolors": BLACK, "zorder": 5}
    _points(axes, parts, parts.baselines, label="uniform", facecolors="none", **uniform)
    _points(
        axes, parts, references, label="reference", marker="^", s=44, facecolors="white", edgecolors=BLACK, zorder=5
    )
    if parts.best is not None:
        _points(axes, parts, [parts.best], label="best", marker="*", s=170, color=RED, edgecolors="white", zorder=6)
    axes.axvline(parts.budget.limit_bytes / MIB, color=GREY, linestyle="--", linewidth=1.2, label="budget", zorder=2)


def _crowd(parts: FrontParts) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Corners (low, high), each (bytes in MiB, score), of most searched measurements, the best and the best uniform.

    None unless there are at least 6 measurements and the corner takes less than a quarter of the picture's width.
    """
    baselines = {e.configuration for e in (*parts.baselines, *parts.references)}
    searched = [e for e in parts.measured if e.configuration not in baselines]
    if len(searched) < 6 or parts.best is None:
        return None
    points = np.array([(_mib(parts, e), e.score) for e in searched])
    shown = [parts.best, *sorted(parts.baselines, key=lambda e: -e.score)[:1]]
    corners = np.array([(_mib(parts, e), e.score) for e in shown if e.ok])
    low = np.minimum(np.quantile(points, 0.1, axis=0), corners.min(axis=0))
    high = np.maximum(np.quantile(points, 0.9, axis=0), corners.max(axis=0))
    everything = [*points[:, 0], *(_mib(parts, e) for e in parts.baselines), parts.budget.limit_bytes / MIB]
    if high[0] - low[0] > 0.2 * (max(everything) - min(everything)):
        return None
    pad = 0.15 * np.maximum(high - low, 1e-9 + 1e-3 * np.abs(high))
    return low - pad, high + pad


def _enlarge(
    axes: Axes,
    corner: Axes,
    parts: FrontParts,
    references: Sequence[Evaluation],
    crowd: tuple[NDArray[np.float64], NDArray[np.float64]],
) -> None:
    _draw_front(corner, parts, references)
    low, high = crowd
    corner.set_xlim(low[0], high[0])
    corner.set_ylim(low[1], high[1])
    corner.tick_params(labelsize=7)
    corner.locator_params(nbins=4)
    corner.set_xlabel("the framed part, enlarged", fontsize=9)
    corner.spines[["top", "right"]].set_visible(True)
    for evaluation in (*parts.baselines, *references):
        x, y = _mib(parts, evaluation), evaluation.score
        if low[0] <= x <= high[0] and low[1] <= y <= high[1]:
            _name(corner, label(evaluation.configuration), x, y, offset=(-24, -4))
    axes.add_patch(_frame(low, high))


def _frame(low: NDArray[np.float64], high: NDArray[np.float64]) -> Rectangle:
    from matplotlib.patches import Rectangle

    width, height = high - low
    return Rectangle((low[0], low[1]), width, height, fill=False, edgecolor=BLACK, linewidth=0.7, zorder=5)


def _mib(parts: FrontParts, evaluation: Evaluation) -> float:
    return evaluation.footprint.bytes(parts.budget.scope) / MIB


def _right_edge(parts: FrontParts) -> float:
    inside = [_mib(parts, e) for e in (*parts.front.evaluations, *parts.baselines)]
    return max([parts.budget.limit_bytes / MIB, *inside])


def _points(axes: Axes, parts: FrontParts, evaluations: Sequence[Evaluation], **style: Any) -> None:
    done = [e for e in evaluations if e.ok]
    if done:
        axes.scatter([_mib(parts, e) for e in done], [e.score for e in done], **{"zorder": 3, **style})


def _front_line(axes: Axes, parts: FrontParts) -> None:
    x = [_mib(parts, e) for e in parts.front.evaluations]
    y = [e.score for e in parts.front.evaluations]
    if x:
        axes.step(x, y, where="post", color=BLUE, linewidth=1.6, marker="o", markersize=4, label="front", zorder=4)


def _name(axes: Axes, text: str, x: float, y: float, *, offset: tuple[float, float] = (4, -4)) -> None:
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=2.5, foreground="white")]
    axes.annotate(
        text, (x, y), xytext=offset, textcoords="offset points", ha="left", va="top", fontsize=8, color=BLACK,
        path_effects=halo, zorder=7,
    )  # fmt: skip


def _level_line(axes: Axes, parts: FrontParts, evaluation: Evaluation) -> None:
    axes.axhline(evaluation.score, color=GREY, linestyle="-.", linewidth=1, zorder=1)
    text = f"reference {label(evaluation.configuration)}, at {_mib(parts, evaluation):.4g} MiB"
    _name(axes, text, axes.get_xlim()[0], evaluation.score, offset=(3, -2))


def legend(axes: Axes, *, inside: bool = False) -> None:
    """A legend beside the axes, or in their emptiest corner; none when nothing has a label."""
    if not axes.get_legend_handles_labels()[0]:
        return
    if inside:  # dominated points lie there: the emptiest corner
        axes.legend(loc="lower right", fontsize=9, framealpha=0.9).set_zorder(8)
    else:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, borderaxespad=0.0, fontsize=9)


def allocation_figure(
    configuration: Configuration,
    layer_names: Sequence[str],
    *,
    importance: Importance | None = None,
    space: SearchSpace | None = None,
) -> Figure:
    """Bits and ranks of every layer in two aligned rows, their correlation in the title.

    With an importance, its normalised scores are drawn as dots on a second axis of each row; with a space, the
    rows reach up to the top of the ladders.
    """
    if len(layer_names) != len(configuration):
        raise ValueError(f"{len(configuration)} layer names are needed, got {len(layer_names)}")
    figure, (top, bottom) = new_figure(min(14.0, max(7.0, 2.0 + 0.1 * len(configuration))), 4.4, rows=2)
    bits, ranks = np.array(configuration.bits), np.array(configuration.ranks)
    ladders = ((), ()) if space is None else (space.bits, space.ranks)
    scores = (None, None) if importance is None else (importance.normalised("bits"), importance.normalised("rank"))
    _bars(top, bits, ladders[0], color=BLUE, name="bits", scores=scores[0])
    _bars(bottom, ranks, ladders[1], color=ORANGE, name="adapter rank", scores=scores[1])
    layer_ticks(bottom, short_names(layer_names))
    figure.suptitle(f"Bits and ranks by layer: {_correlation(bits, ranks)}", fontsize=10)
    return figure


def _bars(
    axes: Axes,
    values: NDArray[np.int64],
    ladder: Sequence[int],
    *,
    color: str,
    name: str,
    scores: NDArray[np.float64] | None,
) -> None:
    positions = np.arange(len(values))
    top = max(1, *(int(v) for v in (*values, *ladder)))
    axes.bar(positions, values, width=0.8, color=color, alpha=0.85)
    axes.set_ylabel(name)
    axes.set_yticks(sorted({0, *(int(v) for v in (*values, *ladder))}))
    axes.set_ylim(0, top * 1.06)
    axes.grid(axis="x", visible=False)
    for position in positions[values == 0]:
        axes.annotate("0", (float(position), 0.0), ha="center", va="bottom", fontsize=7)
    if scores is not None:
        twin = axes.twinx()
        size = 5.0 if len(values) <= 40 else 3.5
        twin.plot(
            positions,
            scores,
            "o",
            color=BLACK,
            markersize=size,
            markeredgecolor="white",
            markeredgewidth=0.6,
            clip_on=False,
        )
        twin.set_ylim(0, 1.06)
        twin.set_yticks([0, 0.5, 1])
        twin.set_ylabel("importance (dots)")
        twin.spines["top"].set_visible(False)


def layer_ticks(axes: Axes, names: Sequence[str]) -> None:
    """Name the layers below a row that has one position for each, thinned out where they are many."""
    positions, labels = _ticks(names)
    longest = max(map(len, labels))
    axes.set_xticks(positions, labels, rotation=0 if longest <= 3 else 90, fontsize=8)
    axes.set_xlim(-0.7, len(names) - 0.3)
    axes.set_xlabel("layer")


def _ticks(names: Sequence[str]) -> tuple[list[int], list[str]]:
    """Positions and labels of at most 40 ticks: all names, or where a new block begins, thinned out evenly."""
    positions, labels = list(range(len(names))), list(names)
    blocks = [name.split(".")[0] for name in names]
    if len(names) > 40 and len(set(blocks)) < len(names) and all(block.isdigit() for block in blocks):
        positions = [i for i in positions if i == 0 or blocks[i] != blocks[i - 1]]
        labels = [blocks[i] for i in positions]
    stride = next(s for s in (1, 2, 4, 5, 10, 20, 50, 100, 1000, len(names)) if len(positions) <= 40 * s)
    return positions[::stride], labels[::stride]


def _correlation(bits: NDArray[np.int64], ranks: NDArray[np.int64]) -> str:
    equal = [name for name, values in (("bits", bits), ("rank", ranks)) if values.std() == 0]
    if equal:
        return f"{' and '.join(equal)} the same everywhere"
    return f"Pearson correlation {np.corrcoef(bits, ranks)[0, 1]:+.2f}"


def progress_figure(records: Sequence[Record], steps: int, *, baseline: Evaluation | None = None) -> Figure:
    """Scores of all rungs and the best so far at `steps` (T_S), against the number of evaluations."""
    figure, axes = new_figure(7.0, 4.0)
    done = [r for r in records if r.evaluation.ok]
    references = [r for r in done if r.candidate.phase == "reference"]
    rungs = sorted({r.evaluation.steps for r in done})
    for number, rung in enumerate(rungs):
        points = [r for r in done if r.evaluation.steps == rung and r.searched]
        shade = BLUE if rung == steps else str(0.78 - 0.4 * number / max(1, len(rungs) - 1))
        _scatter(axes, points, label=f"{rung} steps", color=shade, marker=_MARKERS[number % len(_MARKERS)], s=20)
    _scatter(axes, references, label="reference", marker="v", facecolors="white", edgecolors=BLACK, s=28)
    fresh = [r for r in done if r.evaluation.replicate]
    _scatter(axes, fresh, label="fresh seeds", marker="D", facecolors="white", edgecolors=RED, s=18)
    failed = [r.index + 1 for r in records if not r.evaluation.ok]
    if failed:
        bottom = axes.get_xaxis_transform()
        axes.plot(failed, [0.02] * len(failed), "x", color=BLACK, markersize=5, transform=bottom, label="failed")
    x, y = _best_so_far(records, steps)
    if x:
        axes.step(x, y, where="post", color=RED, linewidth=1.8, label="best so far", zorder=4)
    if baseline is not None:
        name = f"best uniform\n({label(baseline.configuration)})"
        axes.axhline(baseline.score, color=BLACK, linestyle=":", linewidth=1.2, label=name)
    _phases(axes, records)
    axes.set_xlabel("evaluations")
    axes.set_ylabel("validation score")
    legend(axes)
    return figure


def _scatter(axes: Axes, records: Sequence[Record], **style: Any) -> None:
    if records:
        axes.scatter([r.index + 1 for r in records], [r.evaluation.score for r in records], **{"zorder": 3, **style})


def _phases(axes: Axes, records: Sequence[Record]) -> None:
    """Thin lines where a phase begins, with the phases' names above the picture."""
    starts = [i for i, r in enumerate(records) if i == 0 or records[i - 1].candidate.phase != r.candidate.phase]
    stops = [*starts[1:], len(records)]
    for start, stop in zip(starts, stops, strict=False):  # without records there is a stop but no start
        x = records[start].index + 0.5
        axes.axvline(x, color=GREY, linewidth=0.6, zorder=1)
        if stop - start >= 0.1 * len(records) or stop == len(records):  # a shorter one has no room for its name
            axes.annotate(
                records[start].candidate.phase, (x, 1.0), xycoords=("data", "axes fraction"), xytext=(2, 3),
                textcoords="offset points", fontsize=8, color="#404040",
            )  # fmt: skip


def _best_so_far(records: Sequence[Record], steps: int) -> tuple[list[int], list[float]]:
    x: list[int] = []
    y: list[float] = []
    for record in records:
        evaluation = record.evaluation
        if evaluation.ok and evaluation.steps == steps and record.searched:
            x.append(record.index + 1)
            y.append(max(evaluation.score, y[-1] if y else evaluation.score))
    if x:
        x.append(records[-1].index + 1)
        y.append(y[-1])
    return x, y


def new_figure(
    width: float, height: float, *, rows: int = 1, columns: int = 1, share_x: bool | None = None
) -> tuple[Figure, Any]:
    """A figure of a size in inches with its axes; rows share their x axis unless told otherwise."""
    # Figure and canvas without pyplot, whose figures live in a global list and leak.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, sharex=rows > 1 if share_x is None else share_x)
    for one in np.ravel(axes):
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
