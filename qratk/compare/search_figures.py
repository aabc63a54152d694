"""Figures of searches: surrogate, efficiency, ablation, sweeps (Fig. 4, 5, 6, 9 and 10 of the paper)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from qratk.compare.drawing import (
    COLORS,
    PALE,
    Array,
    NoDataError,
    Picture,
    View,
    label_ends,
    label_levels,
    label_points,
    point_style,
    side_by_side,
)
from qratk.compare.read import Outcome
from qratk.compare.table import difference
from qratk.core.plain import flatten
from qratk.reporters.figures import BLACK, BLUE, GREY, MIB, ORANGE, RED, SKY, new_figure
from qratk.settings.sweeps import SweepPoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAMED: Final = 6
Axis = Literal["numbers", "costs"]
_AXES: Final[Mapping[Axis, str]] = {"numbers": "evaluations at $T_S$", "costs": "cost in full runs"}


# Surrogate (Fig. 4)


@dataclass(frozen=True)
class SurrogateRow:
    """How well a surrogate foretold in a generation, or found the top three at the end; NaN in the other's columns."""

    seed: int
    pairs: float
    spearman: float = math.nan
    pearson: float = math.nan
    low_fidelity_spearman: float = math.nan
    top3_hit_rate_surrogate: float = math.nan
    top3_hit_rate_low_fidelity: float = math.nan


def surrogate(view: View) -> Picture:
    """Correlation of predicted and measured scores as pairs grow, and the share of the top three found (Fig. 4)."""
    cells = view.own
    judged = [(cell.seed, g.surrogate) for cell in cells for g in cell.result.generations if g.surrogate]
    rows = [SurrogateRow(seed, q.pairs, q.spearman, q.pearson, q.low_fidelity_spearman) for seed, q in judged]
    found = [(cell.seed, cell.result.top3_hit_rates) for cell in cells if cell.result.top3_hit_rates]
    rates = [
        SurrogateRow(
            seed,
            rate["pairs"],
            top3_hit_rate_surrogate=rate["surrogate"],
            top3_hit_rate_low_fidelity=rate["low_fidelity"],
        )
        for seed, rate in found
    ]
    known = any(not math.isnan(v) for row in rows for v in (row.spearman, row.pearson, row.low_fidelity_spearman))
    if not known and not rates:
        raise NoDataError(f"{view.reference} has no surrogate, or too few pairs to judge it")
    figure, (left, right) = new_figure(9.0, 4.0, columns=2)
    left.get_subplotspec().get_gridspec().set_width_ratios((1.7, 1.0))
    ends = []
    shown: tuple[tuple[str, str, Callable[[SurrogateRow], float]], ...] = (
        ("surrogate, Spearman", BLUE, lambda row: row.spearman),
        ("surrogate, Pearson", SKY, lambda row: row.pearson),
        ("short run, Spearman", ORANGE, lambda row: row.low_fidelity_spearman),
    )
    for name, color, correlation in shown:
        x, mean, low, high = _by_pairs(rows, correlation)
        if len(x):
            left.plot(x, mean, color=color, marker="o", markersize=4, linewidth=1.8, zorder=4)
            left.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
            ends.append((x[-1], mean[-1], name, color))
    left.xaxis.get_major_locator().set_params(integer=True)
    left.set_xlabel("pairs of a short and a full run")
    left.set_ylabel("correlation with the score at $T_S$")
    label_ends(left, ends)
    _hit_rates(right, rates)
    return Picture(figure, SurrogateRow, (*rows, *rates))


def _by_pairs(
    rows: Sequence[SurrogateRow], correlation: Callable[[SurrogateRow], float]
) -> tuple[Array, Array, Array, Array]:
    """Numbers of pairs, ascending, with mean, lowest and highest over seeds; seeds differ a little in how many."""
    known = [(row.pairs, value) for row in rows if not math.isnan(value := correlation(row))]
    if not known:
        return (np.empty(0),) * 4
    pairs, values = np.array(known, dtype=np.float64).T
    seeds = len({row.seed for row in rows})
    order = np.argsort(pairs, kind="stable")
    groups = np.array_split(order, max(1, round(len(order) / seeds)))
    found = [(pairs[g].mean(), values[g].mean(), values[g].min(), values[g].max()) for g in groups]
    x, mean, low, high = np.array(found).T
    return x, mean, low, high


def _hit_rates(axes: Axes, rates: Sequence[SurrogateRow]) -> None:
    if not rates:
        axes.set_visible(False)
        return
    values = np.array([(rate.top3_hit_rate_low_fidelity, rate.top3_hit_rate_surrogate) for rate in rates])
    for row in values:
        axes.plot((0, 1), row, color=PALE, linewidth=1, zorder=2)
    for position, color in ((0, ORANGE), (1, BLUE)):
        axes.scatter(np.full(len(values), position), values[:, position], **point_style(color))
        mean = values[:, position].mean()
        axes.hlines(mean, position - 0.2, position + 0.2, color=BLACK, linewidth=2, zorder=5)
        side, align = ((-8, "right"), (8, "left"))[position]
        axes.annotate(
            f"{mean:.0%}", (position + (-0.2, 0.2)[position], mean), xytext=(side / 2, 0), textcoords="offset points",
            ha=align, va="center", fontsize=9,
        )  # fmt: skip
    axes.set_xticks((0, 1), ("by short run", "by surrogate"))
    axes.set_xlim(-0.6, 1.6)
    axes.set_ylim(0, 1.03)
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("top-3 hit rate")


# Efficiency (Fig. 5)


@dataclass(frozen=True)
class Curve:
    """Best so far of a search after each full evaluation: their number, cost in full runs, score."""

    outcome: Outcome
    numbers: Array
    costs: Array
    scores: Array

    @classmethod
    def of(cls, outcome: Outcome) -> Curve:
        """Curve of a finished cell."""
        ran = zip((record.evaluation for record in outcome.searched), outcome.costs, strict=True)
        problem = outcome.result.problem
        found = [(cost, e.score) for e, cost in ran if e.steps == outcome.top and e.ok and problem.fits(e)]
        costs, scores = np.array(found, dtype=np.float64).reshape(-1, 2).T
        return cls(outcome, np.arange(1, len(costs) + 1, dtype=np.float64), costs, np.maximum.accumulate(scores))

    def along(self, axis: Axis) -> Array:
        """Where its points lie on an axis."""
        return self.numbers if axis == "numbers" else self.costs

    def at(self, grid: Array, axis: Axis) -> Array:
        """Scores at points of an axis; NaN before the first, the last one after the end."""
        places = np.searchsorted(self.along(axis), grid, side="right") - 1
        return np.where(places < 0, np.nan, self.scores[np.maximum(places, 0)])

    def reached(self, target: float) -> int | None:
        """Position of the first evaluation that reaches a score."""
        above = np.flatnonzero(self.scores >= target - 1e-12)
        return int(above[0]) if len(above) else None


def _curves(view: View) -> dict[str, list[Curve]]:
    """Curves by recipe, of those with at least 3 full evaluations in some seed."""
    limits = view.limits
    found = {
        name: [Curve.of(o) for o in view.cells.of(name) if not limits.exceeded(o.limit, o.seed)]
        for name in _without_sweeps(view)
    }
    return {
        name: [curve for curve in curves if len(curve.scores)]
        for name, curves in found.items()
        if any(len(curve.scores) >= 3 for curve in curves)
    }


def _without_sweeps(view: View) -> list[str]:
    return [name for name in view.cells.names if name not in view.cells.sweeps]


@dataclass(frozen=True)
class CurveRow:
    """A point of a recipe's curve: best score so far, over seeds."""

    recipe: str
    axis: str
    x: float
    mean: float
    low: float
    high: float


def efficiency(view: View) -> Picture:
    """Best score so far against evaluations at T_S and against cost, by recipe (Fig. 5, left)."""
    curves = _curves(view)
    if not curves:
        raise NoDataError("no search has 3 evaluations at T_S")
    shift = _alignment(view)
    named = _named(view, curves)
    figure, panels = new_figure(11.0, 4.4, columns=2)
    rows: list[CurveRow] = []
    for axes, (axis, name) in zip(panels, _AXES.items(), strict=True):
        ends = []
        for recipe, group in curves.items():
            grid = _grid(group, axis)
            values = np.array([c.at(grid, axis) + shift.get(c.outcome.seed, 0.0) for c in group])
            known = ~np.isnan(values).any(axis=0)
            x, y = grid[known], values[:, known]
            color = named.get(recipe, PALE)
            strong = recipe in (view.reference, *(o.recipe for o in view.random))
            axes.step(x, y.mean(axis=0), where="post", color=color, linewidth=2.0 if strong else 1.3,
                      zorder=5 if strong else 3)  # fmt: skip
            if strong and len(y) > 1:
                axes.fill_between(x, y.min(axis=0), y.max(axis=0), step="post", color=color, alpha=0.13, linewidth=0)
            if recipe in named:
                ends.append((x[-1], float(y[:, -1].mean()), recipe, color))
            bounds = (y.mean(axis=0), y.min(axis=0), y.max(axis=0))
            rows += [
                CurveRow(recipe, name, *row) for row in zip(x.tolist(), *(b.tolist() for b in bounds), strict=True)
            ]
        axes.set_xlabel(name)
        _zoom(axes, curves, shift)
        if axis == "costs":
            label_ends(axes, ends)
    panels[0].set_ylabel(
        "best validation score so far" + (f"\n(seeds aligned at {view.reference}'s end)" if shift else "")
    )
    others = len(curves) - len(named)
    notes = ["bands: range over seeds"] * bool(shift)
    notes += [f"grey: {others} other recipe{'s' * (others > 1)}"] * (others > 0)
    if notes:
        figure.suptitle("; ".join(notes), fontsize=9)
    return Picture(figure, CurveRow, tuple(rows))


def _alignment(view: View) -> dict[int, float]:
    """What to add to the scores of a seed, so that the reference ends at its mean in each: problems differ by seed."""
    ends = {outcome.seed: outcome.validation for outcome in view.own}
    if len(ends) < 2:
        return {}
    mean = float(np.mean(list(ends.values())))
    return {seed: mean - end for seed, end in ends.items()}


def _named(view: View, curves: Mapping[str, Sequence[Curve]]) -> dict[str, str]:
    """Colours of the recipes that are told apart: reference, random, and those that end highest."""
    ends = {name: float(np.mean([c.scores[-1] for c in group])) for name, group in curves.items()}
    first = [name for name in (view.reference, *dict.fromkeys(o.recipe for o in view.random)) if name in curves]
    rest = sorted((name for name in curves if name not in first), key=lambda name: -ends[name])
    return dict(zip([*first, *rest][:_NAMED], COLORS, strict=False))


def _grid(group: Sequence[Curve], axis: Axis) -> Array:
    return np.unique(np.concatenate([curve.along(axis) for curve in group]))


def _zoom(axes: Axes, curves: Mapping[str, Sequence[Curve]], shift: Mapping[int, float]) -> None:
    """Cut off the first, bad configurations, which would squeeze what matters."""
    every = [c.scores + shift.get(c.outcome.seed, 0.0) for group in curves.values() for c in group]
    ends = [scores[-1] for scores in every]
    starts = [scores[0] for scores in every]
    top, low = max(ends), min(ends)
    span = max(top - low, 0.05 * (top - min(starts)), 1e-9)
    axes.set_ylim(max(min(starts), low - 0.2 * span) - 0.05 * span, top + 0.12 * span)


@dataclass(frozen=True)
class TargetRow:
    """What a search took to reach a score, or took in all where it did not."""

    recipe: str
    seed: int
    target: float
    reached: bool
    evaluations_at_T_S: float  # noqa: N815
    full_runs: float


def target(view: View) -> Picture:
    """Evaluations at T_S and cost until a score is reached, by recipe and seed (Fig. 5, right)."""
    curves = _curves(view)
    targets, name = _targets(view, curves)
    figure, panels = new_figure(10.0, 1.4 + 0.34 * len(curves), columns=2)
    rows: list[TargetRow] = []
    order = sorted(curves, key=lambda recipe: -_median_cost(curves[recipe], targets))
    for level, recipe in enumerate(order):
        for curve in (c for c in curves[recipe] if c.outcome.seed in targets):
            place = curve.reached(targets[curve.outcome.seed])
            at = -1 if place is None else place
            took = (float(curve.numbers[at]), float(curve.costs[at]))
            rows.append(TargetRow(recipe, curve.outcome.seed, targets[curve.outcome.seed], place is not None, *took))
        own = [row for row in rows if row.recipe == recipe]
        _target_level(panels[0], level, [(row.evaluations_at_T_S, row.reached) for row in own])
        _target_level(panels[1], level, [(row.full_runs, row.reached) for row in own])
    for axes, label in zip(panels, _AXES.values(), strict=True):
        axes.set_xlabel(f"{label} until {name}")
        axes.set_xlim(left=0)
        axes.set_ylim(-0.7, len(order) - 0.3)
        axes.set_yticks(range(len(order)), order if axes is panels[0] else [""] * len(order))
    figure.suptitle("dots: seeds; bars: medians; crosses: ended without reaching it", fontsize=9)
    return Picture(figure, TargetRow, tuple(rows))


def _target_level(axes: Axes, level: int, taken: Sequence[tuple[float, bool]]) -> None:
    """Seeds of a recipe at a level, by what each took and whether it reached the score."""
    done = [value for value, reached in taken if reached]
    missed = [value for value, reached in taken if not reached]
    axes.scatter(done, [level] * len(done), **point_style(BLUE))
    axes.scatter(missed, [level] * len(missed), marker="x", color=RED, s=24, linewidths=1.2, zorder=4)
    if len(done) > len(missed):
        middle = float(np.median([*done, *[math.inf] * len(missed)]))
        if math.isfinite(middle):
            axes.vlines(middle, level - 0.28, level + 0.28, color=BLACK, linewidth=2, zorder=2.5)


def _median_cost(curves: Sequence[Curve], targets: Mapping[int, float]) -> float:
    costs = []
    for curve in (c for c in curves if c.outcome.seed in targets):
        place = curve.reached(targets[curve.outcome.seed])
        costs.append(1e9 if place is None else float(curve.costs[place]))
    return float(np.mean(np.minimum(costs, 1e6))) if costs else 1e9


def _targets(view: View, curves: Mapping[str, Sequence[Curve]]) -> tuple[dict[int, float], str]:
    """The score to reach in each seed: what the random recipe ends with, or a quantile of all that was measured."""
    random = {name for name in curves for o in view.random if o.recipe == name}
    if view.target is None and random:
        ends = {c.outcome.seed: float(c.scores[-1]) for name in random for c in curves[name]}
        return ends, f"{next(iter(random))}'s best is reached"
    if not curves:
        raise NoDataError("no search has 3 evaluations at T_S")
    quantile = 0.9 if view.target is None else view.target
    pooled: dict[int, list[float]] = {}
    for group in curves.values():
        for curve in group:
            pooled.setdefault(curve.outcome.seed, []).extend(e.score for e in curve.outcome.high)
    return {
        seed: float(np.quantile(scores, quantile)) for seed, scores in pooled.items()
    }, f"the {quantile:.0%} quantile is reached"


# Ablation (Fig. 6)


@dataclass(frozen=True)
class AblationRow:
    """A recipe's means over seeds; the score is the reference's mean and the difference paired by seed."""

    recipe: str
    average_bits: float
    bytes: float
    score: float
    low: float
    high: float
    over_budget: bool


Size = Callable[[AblationRow], float]
"""What a recipe is drawn by, in the unit of the axis."""


def ablation(view: View) -> Picture:
    """Score against average bits and bytes, a point a recipe (Fig. 6)."""
    names = _without_sweeps(view)
    if len(names) < 2:
        raise NoDataError("there is one recipe only")
    base = float(np.mean([outcome.score for outcome in view.own]))
    rows = [_ablation_row(view, name, base) for name in names]
    figure, panels = new_figure(11.5, 5.0, columns=2)
    sizes: tuple[Size, Size] = (lambda row: row.average_bits, lambda row: row.bytes / MIB)
    for axes, size in zip(panels, sizes, strict=True):
        _ablation_panel(axes, view.reference, rows, size)
    panels[0].set_xlabel("average bits (equal ones are drawn side by side)")
    panels[1].set_xlabel(f"{view.own[0].result.problem.scope} bytes (MiB; equal ones are drawn side by side)")
    panels[0].set_ylabel(f"test score (bars: 95% interval of the\ndifference to {view.reference}, paired by seed)")
    return Picture(figure, AblationRow, tuple(rows))


def _ablation_row(view: View, name: str, base: float) -> AblationRow:
    cells, limits = view.cells.of(name), view.limits
    gap = difference(cells, {outcome.seed: outcome for outcome in view.own})
    return AblationRow(
        recipe=name,
        average_bits=float(np.mean([cell.best.average_bits for cell in cells])),
        bytes=float(np.mean([cell.best.bytes for cell in cells])),
        score=base + gap.mean if gap.seeds else float(np.mean([cell.score for cell in cells])),
        low=base + gap.low,
        high=base + gap.high,
        over_budget=any(limits.exceeded(cell.best.bytes, cell.seed) for cell in cells),
    )


def _ablation_panel(axes: Axes, reference: str, rows: Sequence[AblationRow], size: Size) -> None:
    inside = _merged([row for row in rows if not row.over_budget], reference, size)
    labels = []
    for (names, row), x in zip(inside, side_by_side([size(row) for _, row in inside]), strict=True):
        main = reference in names
        if not math.isnan(row.low) and not main:
            axes.vlines(x, row.low, row.high, color=PALE, linewidth=1.2, zorder=2)
        color = RED if main else BLUE
        axes.scatter([x], [row.score], marker="*" if main else "o", s=150 if main else 34, color=color,
                     edgecolors="white", linewidths=0.6, zorder=6 if main else 4)  # fmt: skip
        labels.append((float(x), row.score, ", ".join(names), color if main else BLACK))
    axes.margins(x=0.16, y=0.1)
    left = sum(x < sum(axes.get_xlim()) / 2 for x, *_ in labels) > len(labels) / 2
    over = [
        (row.score, f"{row.recipe}: {row.score:.4f} at {size(row):.4g}, over the budget")
        for row in rows
        if row.over_budget
    ]
    _over_lines(axes, over, right=left)
    label_points(axes, labels, size=7.5)


def _merged(rows: Sequence[AblationRow], reference: str, size: Size) -> list[tuple[tuple[str, ...], AblationRow]]:
    """Recipes that ended at the same point under one label, by rising score; the reference comes first in its own."""
    found: dict[tuple[float, float], list[AblationRow]] = {}
    for row in sorted(rows, key=lambda row: (row.score, row.recipe != reference)):
        found.setdefault((round(size(row), 6), round(row.score, 5)), []).append(row)
    return [(tuple(row.recipe for row in same), same[0]) for same in found.values()]


def _over_lines(axes: Axes, lines: Sequence[tuple[float, str]], *, right: bool) -> None:
    """Recipes over the budget, (score, text), as level lines, or as notes at the edge where one would squeeze the rest.

    The texts stand at the left, or at the right, and do not lie on each other.
    """
    low, high = axes.get_ylim()
    near = [low - 0.3 * (high - low) < level < high + 0.3 * (high - low) for level, _ in lines]
    for (level, _), drawn in zip(lines, near, strict=True):
        if drawn:
            axes.axhline(level, color=GREY, linestyle="-.", linewidth=1, zorder=1)
    texts = []
    for (level, text), drawn in zip(lines, near, strict=True):
        arrow = "" if drawn else "↑ " if level > high else "↓ "
        texts.append((float(np.clip(level, *axes.get_ylim())), arrow + text))
    label_levels(axes, texts, right=right)


# Sweeps (Fig. 9, 10)


@dataclass(frozen=True)
class Sweep:
    """One setting's values in order, with cells of each; `default` is the base's, which is among them."""

    setting: str
    values: tuple[str, ...]
    cells: tuple[tuple[Outcome, ...], ...]
    default: str | None

    def positions(self) -> Array:
        """Where the values lie on an axis: themselves if they are numbers, else 0, 1, 2, ..."""
        try:
            return np.array([float(value) for value in self.values])
        except ValueError:
            return np.arange(len(self.values), dtype=np.float64)

    @property
    def numeric(self) -> bool:
        """Whether all values are numbers."""
        return all(_number(value) is not None for value in self.values)


def sweeps(view: View) -> list[Sweep]:
    """The one-factor sweeps: recipes that are points of one; raises `NoDataError` when there are none."""
    found: dict[str, dict[str, tuple[Outcome, ...]]] = {}
    defaults: dict[str, str] = {}
    for name, point in ((name, view.cells.sweeps[name]) for name in view.cells.names if name in view.cells.sweeps):
        setting, value = point.setting, point.value
        cells = view.cells.of(name)
        found.setdefault(setting, {})[value] = cells
        base = next((outcome for outcome in view.own if outcome.seed == cells[0].seed), view.own[0])
        if (default := _default(cells[0], base, point.option, value)) is not None:
            defaults.setdefault(setting, default)
    if not found:
        raise NoDataError("no recipe is a point of a sweep")
    options = {setting: SweepPoint(setting, "").option for setting in found}
    return [_sweep(options[s], by_value, defaults.get(s), view.own) for s, by_value in found.items()]


def _sweep(
    setting: str, by_value: Mapping[str, tuple[Outcome, ...]], default: str | None, own: tuple[Outcome, ...]
) -> Sweep:
    cells = dict(by_value)
    if default is not None and not any(_same(default, value) for value in cells):
        cells[default] = own
    numeric = all(_number(value) is not None for value in cells)
    values = sorted(cells, key=lambda value: _number(value) or 0.0) if numeric else list(cells)
    return Sweep(setting, tuple(values), tuple(cells[value] for value in values), default)


def _default(cell: Outcome, base: Outcome, option: str, value: str) -> str | None:
    """What the base says where the swept recipe says `value`: of the option of that name, or of the only other one."""
    ours, theirs = (_flat(outcome.settings.section("search")) for outcome in (cell, base))
    differing = [key for key in ours if key in theirs and ours[key] != theirs[key] and key not in ("name", "seed")]
    chosen = [key for key in differing if key.rpartition(".")[2] == option] or [
        key for key in differing if _same(_told(ours[key]), value)
    ]
    before = {_told(theirs[key]) for key in chosen or differing}  # the same setting of several operators counts once
    return before.pop() if len(before) == 1 else None


def _flat(section: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with dotted keys, those of listed components too."""
    flat = flatten(section)
    for key, value in list(flat.items()):
        if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            del flat[key]
            for number, item in enumerate(value):
                flat |= flatten(item, f"{key}.{number}.")
    return flat


def _told(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _same(a: str, b: str) -> bool:
    x, y = _number(a), _number(b)
    return a == b if x is None or y is None else math.isclose(x, y)


def _gains(sweep: Sweep, view: View) -> list[tuple[float, float, float]]:
    """Mean and interval of the score minus the reference's, paired by seed, for each value."""
    against = {outcome.seed: outcome for outcome in view.own}
    found = [difference(cells, against) for cells in sweep.cells]
    return [(gap.mean, gap.low, gap.high) for gap in found]


@dataclass(frozen=True)
class SensitivityRow:
    """How far the mean score ranges over the values of a setting."""

    setting: str
    range: float
    values: int


def sensitivity(view: View) -> Picture:
    """Range of the mean score over each sweep, largest first: S(h) of Eq. 29 (Fig. 9)."""
    made = [(sweep, [gain for gain, _, _ in _gains(sweep, view)]) for sweep in sweeps(view)]
    made = [(sweep, [g for g in gains if not math.isnan(g)]) for sweep, gains in made]
    ranking = [SensitivityRow(s.setting, max(g) - min(g), len(g)) for s, g in made if len(g) > 1]
    ranking.sort(key=lambda row: row.range)
    if not ranking:
        raise NoDataError("no sweep has two values")
    figure, axes = new_figure(7.0, 1.2 + 0.34 * len(ranking))
    axes.barh(range(len(ranking)), [row.range for row in ranking], color=BLUE, alpha=0.85, height=0.65)
    for level, row in enumerate(ranking):
        axes.annotate(
            f"{row.range:.3g}  ({row.values} values)", (row.range, level), xytext=(4, 0), textcoords="offset points",
            va="center", fontsize=8,
        )  # fmt: skip
    axes.set_yticks(range(len(ranking)), [row.setting for row in ranking])
    axes.set_xlim(0, 1.25 * max(ranking[-1].range, 1e-9))
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("range of the mean test score over the sweep")
    return Picture(figure, SensitivityRow, tuple(ranking[::-1]))


@dataclass(frozen=True)
class SweepRow:
    """Score minus the reference's, with its interval, at a value of a setting; `default` marks the base's own."""

    setting: str
    value: str
    difference: float
    low: float
    high: float
    default: bool


def sweep_curves(view: View) -> Picture:
    """Score minus the reference's over the values of each setting (Fig. 10)."""
    made = sweeps(view)
    columns = min(4, len(made))
    height = -(-len(made) // columns)
    figure, every = new_figure(0.8 + 2.8 * columns, 0.6 + 2.5 * height, rows=height, columns=columns, share_x=False)
    flat = np.ravel(every)
    rows: list[SweepRow] = []
    for axes, sweep in zip(flat, made, strict=False):
        gains = _gains(sweep, view)
        _sweep_panel(axes, sweep, gains)
        rows += [
            SweepRow(sweep.setting, v, *gain, v == sweep.default) for v, gain in zip(sweep.values, gains, strict=True)
        ]
    for axes in flat[len(made) :]:
        axes.set_visible(False)
    low, high = (f(axes.get_ylim()[i] for axes in flat[: len(made)]) for i, f in ((0, min), (1, max)))
    for axes in flat[: len(made)]:
        axes.set_ylim(low, high)
    line = "\n" if height == 1 else " "
    figure.supylabel(f"test score minus {view.reference}'s,{line}paired by seed", fontsize=9)
    figure.suptitle("bands: 95% interval over seeds; dashed: the default", fontsize=9)
    return Picture(figure, SweepRow, tuple(rows))


def _sweep_panel(axes: Axes, sweep: Sweep, gains: Sequence[tuple[float, float, float]]) -> None:
    mean, low, high = np.array(gains).T
    x, wide = sweep.positions(), False
    if sweep.numeric:
        wide = x.min() > 0 and x.max() / x.min() > 20
    x = np.log10(x) if wide else x
    axes.axhline(0, color=GREY, linewidth=0.8, zorder=1)
    axes.plot(x, mean, color=BLUE, marker="o", markersize=4, linewidth=1.6, zorder=4)
    axes.fill_between(x, np.where(np.isnan(low), mean, low), np.where(np.isnan(high), mean, high), color=BLUE,
                      alpha=0.18, linewidth=0)  # fmt: skip
    places = [
        place for place, value in zip(x, sweep.values, strict=True) if sweep.default and _same(value, sweep.default)
    ]
    for place in places:
        axes.axvline(place, color=RED, linestyle="--", linewidth=1.1, zorder=2)
    axes.set_xticks(x, [_short(value) for value in sweep.values], fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    axes.margins(x=0.12)
    axes.set_title(sweep.setting, fontsize=9)


def _short(value: str) -> str:
    return value if len(value) <= 8 else value[:7] + "…"
