"""Figures of the problem: spread, proxies, allocations, importance, repair (Fig. 1, 3, 7 and 8 of the paper)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from qratk.compare.drawing import (
    Array,
    NoDataError,
    Picture,
    View,
    over_seeds,
    point_style,
    seed_colors,
)
from qratk.compare.read import Outcome
from qratk.core.configuration import KNOBS, Configuration, Knob
from qratk.core.correlation import pearson, spearman
from qratk.core.evaluation import Evaluation
from qratk.core.text import short_names
from qratk.reporters.figures import BLACK, BLUE, GREY, ORANGE, RED, SKY, layer_ticks, legend, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NEAR = 0.95
ROUNDING = "weighted quantisation error (log)"
SHORT_RUN = "score at $T_1$"


@dataclass(frozen=True)
class SpreadRow:
    """A configuration that takes nearly all of the budget."""

    seed: int
    storage_bytes: int
    score: float
    configuration: str


def spread(view: View) -> Picture:
    """Scores at T_S of configurations that take nearly all of the budget, seed by seed (Fig. 1a)."""
    groups = {seed: _equal_bytes(view, seed) for seed in view.cells.seeds}
    groups = {seed: found for seed, found in groups.items() if len(found) >= 3}
    if not groups:
        raise NoDataError(
            f"fewer than 3 configurations with {_NEAR:.0%} of the budget were measured at T_S in every seed"
        )
    figure, axes = new_figure(min(12.0, 4.0 + 0.75 * len(groups)), 4.2)
    rows = []
    for number, (seed, found) in enumerate(groups.items()):
        scores = np.array([e.score for e in found])
        jitter = np.random.default_rng(0).uniform(-0.22, 0.22, size=len(found))
        mixed = np.array([len(set(e.configuration.layers)) > 1 for e in found])
        axes.vlines(number, scores.min(), scores.max(), color=GREY, linewidth=1, zorder=2)
        axes.scatter(number + jitter[mixed], scores[mixed], label=None if number else "mixed", **point_style(SKY))
        axes.scatter(
            number + jitter[~mixed], scores[~mixed], marker="s", s=36, facecolors="white", edgecolors=BLACK, zorder=4,
            label=None if number else "uniform",
        )  # fmt: skip
        axes.annotate(
            f"{np.ptp(scores):.3g}", (number, scores.max()), xytext=(0, 5), textcoords="offset points", ha="center",
            fontsize=8,
        )  # fmt: skip
        rows += [SpreadRow(seed, e.footprint.storage_bytes, e.score, _layer_by_layer(e.configuration)) for e in found]
    _label_again(axes, ("mixed", "uniform"))
    axes.set_xticks(range(len(groups)), [str(seed) for seed in groups])
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.margins(y=0.1)
    axes.set_xlabel("seed (above the points: range of the scores)")
    axes.set_ylabel("validation score")
    axes.set_title(f"{len(rows)} configurations that take {_NEAR:.0%} to 100% of the budget", fontsize=10)
    legend(axes)
    return Picture(figure, SpreadRow, tuple(rows))


def _label_again(axes: Axes, names: Sequence[str]) -> None:
    """Nothing was drawn under a name whose first group is empty: its legend entry goes."""
    for artist in axes.collections:
        if artist.get_label() in names and np.size(artist.get_offsets()) == 0:
            artist.set_label("_" + str(artist.get_label()))


def _equal_bytes(view: View, seed: int) -> list[Evaluation]:
    found: dict[Configuration, Evaluation] = {}
    for outcome in view.pool:
        if outcome.seed == seed:
            for e in outcome.high:
                if _NEAR * outcome.limit <= e.footprint.bytes(outcome.result.problem.scope) <= outcome.limit:
                    found.setdefault(e.configuration, e)
    return list(found.values())


def _layer_by_layer(configuration: Configuration) -> str:
    return " ".join(map(str, configuration.layers))


@dataclass(frozen=True)
class ProxyRow:
    """What a proxy says of a configuration, and what was measured of it."""

    proxy: str
    seed: int
    value: float
    score: float


def proxies(view: View) -> Picture:
    """What can be had without fine-tuning, or after little of it, against the score after it (Fig. 1b)."""
    lowest = dict.fromkeys(outcome.proxy or SHORT_RUN for outcome in (*view.random, *view.own, *view.pool))
    read: dict[str, Callable[[Outcome], Pairs]] = {ROUNDING: _by_error}
    read |= {name: partial(_by_lowest, name) for name in sorted(lowest, key=SHORT_RUN.__ne__)}
    panels = {name: found for name, pairs in read.items() if (found := _pairs(view, pairs))}
    if not panels:
        raise NoDataError("fewer than 5 configurations were measured both by a proxy and at T_S")
    figure, every = new_figure(1.2 + 3.9 * len(panels), 4.0, columns=len(panels))
    rows = []
    for axes, (name, pairs) in zip(np.ravel(every), panels.items(), strict=True):
        _proxy_panel(axes, name, pairs, logarithmic=name == ROUNDING)
        rows += [ProxyRow(name, seed, x, y) for seed, found in pairs.items() for x, y in found]
    np.ravel(every)[0].set_ylabel(_centred("score at $T_S$", len({row.seed for row in rows})))
    return Picture(figure, ProxyRow, tuple(rows))


def _centred(text: str, seeds: int) -> str:
    return f"{text} minus the seed's mean" if seeds > 1 else text


def _proxy_panel(axes: Axes, name: str, pairs: dict[int, list[tuple[float, float]]], *, logarithmic: bool) -> None:
    colors = seed_colors(list(pairs))
    correlations = []
    for seed, found in pairs.items():
        x, y = np.array(found).T
        correlations.append(spearman(x, y))
        level = y.mean() if len(pairs) > 1 else 0.0
        axes.scatter(x, y - level, **point_style(colors[seed]))
    if logarithmic:
        _log_axis(axes)
    else:
        axes.locator_params(axis="x", nbins=6)
    axes.set_xlabel(name)
    axes.set_title(f"rank correlation {over_seeds(correlations)}".replace(" (", "\n("), fontsize=9)


def _log_axis(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


Pairs = list[tuple[Configuration, float, float]]
"""Configurations with what a proxy says of them and their score at T_S."""


def _pairs(view: View, read: Callable[[Outcome], Pairs]) -> dict[int, list[tuple[float, float]]]:
    """(proxy, score) of configurations by seed, where there are at least 5.

    Those of the random recipe where there is one: a guided search leaves out what its proxies say is bad.
    """
    for cells in (view.random, view.own, view.pool):
        by_seed: dict[int, dict[Configuration, tuple[float, float]]] = {}
        for outcome in cells:
            for configuration, x, y in read(outcome):
                by_seed.setdefault(outcome.seed, {})[configuration] = (x, y)
        enough = {seed: list(found.values()) for seed, found in sorted(by_seed.items()) if len(found) >= 5}
        if enough:
            return enough
    return {}


def _by_error(outcome: Outcome) -> Pairs:
    """Importance-weighted error of rounding: I_q at the lowest bits, a quarter of it a bit more (Eq. 24)."""
    importance = outcome.importance("bits")
    lowest = min(outcome.result.problem.bits)
    if not importance.any():
        return []
    return [
        (e.configuration, float((importance * 4.0 ** (lowest - np.array(e.configuration.bits))).sum()), e.score)
        for e in outcome.varied
    ]


def _by_lowest(name: str, outcome: Outcome) -> Pairs:
    """Scores at the lowest rung, if that is what they are of."""
    steps = outcome.result.problem.steps
    if len(steps) < 2 or (outcome.proxy or SHORT_RUN) != name:
        return []
    short = (r.evaluation for r in outcome.searched if r.evaluation.steps == steps[0] and r.evaluation.ok)
    low = {e.configuration: e.score for e in short}
    return [(e.configuration, low[e.configuration], e.score) for e in outcome.varied if e.configuration in low]


@dataclass(frozen=True)
class AllocationRow:
    """What the answers give a layer: mean and range over seeds."""

    layer: str
    bits: float
    bits_low: float
    bits_high: float
    rank: float
    rank_low: float
    rank_high: float


def allocation(view: View) -> Picture:
    """Bits and ranks by layer of the reference's answers: mean and range over seeds (Fig. 3)."""
    cells = view.own
    bits = np.array([cell.best.configuration.bits for cell in cells], dtype=np.float64)
    ranks = np.array([cell.best.configuration.ranks for cell in cells], dtype=np.float64)
    problem = cells[0].result.problem
    return bits_and_ranks(
        f"Best of {view.reference}", cells[0].layers, bits, ranks, bits_ladder=problem.bits, rank_ladder=problem.ranks
    )


def bits_and_ranks(
    title: str,
    layers: Sequence[str],
    bits: Array,
    ranks: Array,
    *,
    bits_ladder: Sequence[int],
    rank_ladder: Sequence[int],
) -> Picture:
    """Bits and ranks (seeds, L) by layer: mean and range over seeds, and their correlation."""
    correlations = [pearson(b, r) for b, r in zip(bits, ranks, strict=True)]
    figure, (top, bottom) = new_figure(_width(bits.shape[1]), 4.6, rows=2)
    _range_bars(top, bits, BLUE, "bits", ticks=bits_ladder)
    _range_bars(bottom, ranks, ORANGE, "adapter rank", ticks=rank_ladder)
    layer_ticks(bottom, short_names(layers))
    figure.suptitle(f"{title}: correlation of bits and ranks {over_seeds(correlations)}", fontsize=10)
    columns = [f(values, axis=0).tolist() for values in (bits, ranks) for f in (np.mean, np.min, np.max)]
    rows = (AllocationRow(*row) for row in zip(layers, *columns, strict=True))
    return Picture(figure, AllocationRow, tuple(rows))


def _width(layers: int) -> float:
    return min(14.0, max(7.0, 2.0 + 0.22 * layers))


def _range_bars(axes: Axes, values: Array, color: str, name: str, *, ticks: Sequence[int] | None = None) -> None:
    """Bars of the mean over rows, with the range as a line."""
    positions = np.arange(values.shape[1])
    mean, low, high = values.mean(axis=0), values.min(axis=0), values.max(axis=0)
    axes.bar(positions, mean, width=0.8, color=color, alpha=0.85)
    if len(values) > 1:
        axes.vlines(positions, low, high, color=BLACK, linewidth=1.1, zorder=4)
    axes.set_ylabel(name)
    if ticks is not None:
        axes.set_yticks(sorted({0, *ticks}))
    axes.set_ylim(0, 1.06 * max(high.max(), *(ticks or (0.0, 0.0))))
    axes.grid(axis="x", visible=False)


@dataclass(frozen=True)
class ImportanceRow:
    """Normalised importance of a layer, mean over seeds."""

    layer: str
    bits_importance: float
    rank_importance: float


def importance(view: View) -> Picture:
    """Normalised importance of every layer for bits and for rank (Fig. 7)."""
    cells = view.own
    bits, rank = (np.array([_normalised(cell.importance(knob)) for cell in cells]) for knob in KNOBS)
    if not bits.any() and not rank.any():
        raise NoDataError(f"{view.reference} gives all layers the same importance")
    figure, (top, bottom) = new_figure(_width(bits.shape[1]), 4.6, rows=2)
    _range_bars(top, bits, BLUE, "importance\nfor bits", ticks=None)
    _range_bars(bottom, rank, ORANGE, "importance\nfor rank", ticks=None)
    layer_ticks(bottom, short_names(cells[0].layers))
    correlations = [spearman(b, r) for b, r in zip(bits, rank, strict=True)]
    figure.suptitle(f"Importance of layers: rank correlation {over_seeds(correlations)}", fontsize=10)
    means = zip(cells[0].layers, bits.mean(axis=0).tolist(), rank.mean(axis=0).tolist(), strict=True)
    return Picture(figure, ImportanceRow, tuple(ImportanceRow(*row) for row in means))


def _normalised(scores: Array) -> Array:
    width = float(np.ptp(scores))
    return np.zeros_like(scores) if width == 0 else (scores - scores.min()) / width


@dataclass(frozen=True)
class RepairRow:
    """How important a layer is, and how large a share of the repair's downgrades it takes."""

    knob: Knob
    seed: int
    layer: str
    importance: float
    share_of_downgrades: float


def repair(view: View) -> Picture:
    """How often repair lowers a layer, against how important that layer is (Fig. 8)."""
    panels = []
    for knob in KNOBS:
        found = [(cell, _intensity(cell, knob)) for cell in view.own]
        found = [(cell, counts) for cell, counts in found if counts.sum() > 0]
        if found:
            panels.append((knob, found))
    if not panels:
        raise NoDataError("no result says which layers repair lowered")
    figure, every = new_figure(1.6 + 3.9 * len(panels), 4.0, columns=len(panels))
    rows: list[RepairRow] = []
    points = None
    for axes, (knob, found) in zip(np.ravel(every), panels, strict=True):
        x = np.array([_normalised(cell.importance(knob)) for cell, _ in found])
        y = np.array([counts / counts.sum() for _, counts in found])
        layers = np.tile(np.arange(x.shape[1]), len(found))
        points = axes.scatter(x.ravel(), y.ravel(), c=layers, cmap="cividis", s=30, linewidths=0, alpha=0.9, zorder=3)
        _fit_line(axes, x.ravel(), y.ravel())
        name = "bits" if knob == "bits" else "ranks"
        axes.set_xlabel(f"importance of the layer for {name}")
        correlations = [pearson(a, b) for a, b in zip(x, y, strict=True)]
        axes.set_title(f"{name}: correlation {over_seeds(correlations)}".replace(" (", "\n("), fontsize=9)
        rows += [
            RepairRow(knob, cell.seed, layer, a, b)
            for (cell, _), xs, ys in zip(found, x, y, strict=True)
            for layer, a, b in zip(cell.layers, xs.tolist(), ys.tolist(), strict=True)
        ]
    np.ravel(every)[0].set_ylabel("share of the repair's downgrades")
    if points is not None:
        from matplotlib.ticker import MaxNLocator

        figure.colorbar(points, ax=every, label="layer", shrink=0.8).locator = MaxNLocator(integer=True)
    return Picture(figure, RepairRow, tuple(rows))


def _intensity(cell: Outcome, knob: Knob) -> Array:
    counts = cell.result.proposals.get(f"repaired_{knob}")
    return np.array(counts if isinstance(counts, tuple) else [0.0], dtype=np.float64)


def _fit_line(axes: Axes, x: Array, y: Array) -> None:
    if len(x) > 2 and np.ptp(x) > 0:
        slope, level = np.polyfit(x, y, 1)
        ends = np.array([x.min(), x.max()])
        axes.plot(ends, level + slope * ends, color=RED, linestyle="--", linewidth=1.4, zorder=4)
