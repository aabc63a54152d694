"""What the figures of a comparison share: pictures with their data, correlations, labels that do not collide."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from qratk.compare.read import Cells, Limits, Outcome
from qratk.reporters.figures import BLUE, GREEN, ORANGE, PURPLE, RED, SKY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[np.float64]
COLORS: Final = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY)
PALE: Final = "#C4C4C4"


class NoDataError(Exception):
    """The data of a figure are not there; says what is missing."""


@dataclass(frozen=True)
class Picture:
    """A figure and the figures in it, as rows of one dataclass, whose fields are the columns of the table."""

    figure: Figure
    row: type
    rows: tuple[Any, ...]

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(column.name for column in fields(self.row))

    @property
    def lines(self) -> tuple[tuple[Any, ...], ...]:
        """The rows as a table holds them: yes and no are 1 and 0."""
        return tuple(tuple(int(v) if isinstance(v, bool) else v for v in astuple(row)) for row in self.rows)


@dataclass(frozen=True)
class View:
    """What a figure is drawn of: the cells under one budget, and which recipe stands in the middle."""

    cells: Cells
    reference: str
    target: float | None = None

    @property
    def own(self) -> tuple[Outcome, ...]:
        """Cells of the reference; raises `NoDataError` when there are none."""
        found = self.cells.of(self.reference)
        if not found:
            raise NoDataError(f"no finished search of {self.reference}")
        return found

    @property
    def random(self) -> tuple[Outcome, ...]:
        """Cells of the random recipe over the reference's ladders, if there is one."""
        ladders = self.own[0].ladders
        found = (self.cells.of(name) for name in self.cells.names)
        return next((cells for cells in found if is_random(cells[0]) and cells[0].ladders == ladders), ())

    @property
    def pool(self) -> tuple[Outcome, ...]:
        """All cells of the reference's space and budget, whose measurements may be pooled."""
        limits, layers = self.limits.by_seed, self.own[0].layers
        return tuple(o for o in self.cells.outcomes if o.limit == limits.get(o.seed) and o.layers == layers)

    @property
    def limits(self) -> Limits:
        """Budgets of the reference."""
        return Limits.of(self.own)


Drawing = Callable[[View], Picture]


def is_random(outcome: Outcome) -> bool:
    """Whether a search proposed at random from the whole space and refined nothing."""
    searcher, refiner = (outcome.settings.component(slot) for slot in ("searcher", "refiner"))
    if searcher is None or searcher.name != "random" or searcher.options.get("around", "space") != "space":
        return False
    return refiner is None or refiner.name == "none"


def over_seeds(values: Sequence[float], digits: int = 2) -> str:
    """Mean of signed figures with their range: '+0.46 (+0.31 to +0.58 over 5 seeds)'."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "not defined"
    mean = f"{np.mean(known):+.{digits}f}"
    if len(known) == 1:
        return mean
    return f"{mean} ({min(known):+.{digits}f} to {max(known):+.{digits}f} over {len(known)} seeds)"


def halo() -> list[Any]:
    """Path effects that keep text readable over lines."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=2.5, foreground="white")]


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]], *, size: float = 8.0) -> None:
    """Names at the right ends (x, y, text, colour) of lines, moved apart where they would lie on each other."""
    if not ends:
        return
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]
    height = size * 1.25 * axes.figure.dpi / 72
    order = sorted(ends, key=lambda end: end[1])
    wanted = [float(axes.transData.transform((x, y))[1]) for x, y, _, _ in order]
    placed = _apart(wanted, height)
    right = axes.get_xlim()[1]
    for (x, y, text, color), at in zip(order, placed, strict=True):
        level = float(axes.transData.inverted().transform((0, at))[1])
        axes.annotate(
            text, (x, y), xytext=(right, level), textcoords="data", va="center", ha="left", fontsize=size, color=color,
            annotation_clip=False,
        )  # fmt: skip


def label_levels(axes: Axes, levels: Sequence[tuple[float, str]], *, right: bool, size: float = 7.5) -> None:
    """Texts (y, text) over level lines, at the left or right edge, moved apart where they would lie on each other."""
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]
    scale = axes.figure.dpi / 72
    order = sorted(levels)
    wanted = [float(axes.transData.transform((0, y))[1]) + 0.8 * size * scale for y, _ in order]
    for (_, text), at in zip(order, _apart(wanted, 1.3 * size * scale), strict=True):
        level = float(axes.transAxes.inverted().transform((0, at))[1])
        axes.text(
            0.99 if right else 0.01, level, text, ha="right" if right else "left", va="center", fontsize=size,
            color="#404040", transform=axes.transAxes, path_effects=halo(), zorder=5,
        )  # fmt: skip


def _apart(wanted: Sequence[float], gap: float) -> list[float]:
    """Ascending positions at least a gap apart, each as near to the wanted one as its group allows."""
    groups: list[tuple[list[float], float]] = []  # wanted positions of a group, and where its first one lies
    for position in wanted:
        members, start = [position], position
        while groups and groups[-1][1] + len(groups[-1][0]) * gap > start:
            members = groups.pop()[0] + members
            start = float(np.mean([value - gap * number for number, value in enumerate(members)]))
        groups.append((members, start))
    return [start + gap * number for members, start in groups for number in range(len(members))]


def label_points(axes: Axes, points: Sequence[tuple[float, float, str, str]], *, size: float = 8.0) -> None:
    """Names beside points (x, y, text, colour), each at the first of some places where it hits nothing."""
    figure = axes.figure
    figure.draw_without_rendering()  # type: ignore[union-attr]
    scale = figure.dpi / 72
    at = [axes.transData.transform((x, y)) for x, y, _, _ in points]
    taken = [_box(px, py, 8 * scale, 8 * scale) for px, py in at]
    taken += [(box.x0, box.x1, box.y0, box.y1) for box in (written.get_window_extent() for written in axes.texts)]
    frame = axes.get_window_extent()
    for (x, y, text, color), (px, py) in sorted(zip(points, at, strict=True), key=lambda item: -item[1][1]):
        width, height = 0.56 * size * len(text) * scale, 1.2 * size * scale
        dx, dy = _free_place(px, py, width, height, scale, taken, frame)
        taken.append(_box(px + dx + width / 2, py + dy, width, height))
        line = {"arrowstyle": "-", "color": PALE, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 3}
        axes.annotate(
            text, (x, y), xytext=(dx / scale, dy / scale), textcoords="offset points", va="center", ha="left",
            fontsize=size, color=color, path_effects=halo(), zorder=7,
            arrowprops=line if abs(dy) > 5 * scale else None,
        )  # fmt: skip


def _free_place(
    px: float, py: float, width: float, height: float, scale: float, taken: Sequence[Any], frame: Any
) -> tuple[float, float]:
    right, left = 6 * scale, -6 * scale - width
    for distance in (0, 10, -10, 18, -18, 27, -27, 36, -36, 48, -48, 60, -60, 75, -75):
        for dx in (right, left):
            dy = distance * scale
            box = _box(px + dx + width / 2, py + dy, width, height)
            inside = box[0] >= frame.x0 and box[1] <= frame.x1 and box[2] >= frame.y0 and box[3] <= frame.y1
            if inside and not any(_meet(box, other) for other in taken):
                return dx, dy
    return right, 0.0


def _box(x: float, y: float, width: float, height: float) -> tuple[float, float, float, float]:
    return x - width / 2, x + width / 2, y - height / 2, y + height / 2


def _meet(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3]


def side_by_side(values: Sequence[float]) -> Array:
    """The values, with those that all but coincide moved a little apart around their mean, in the order given."""
    exact = np.asarray(values, dtype=np.float64)
    span = float(np.ptp(exact)) if exact.size else 0.0
    width = span or 0.1 * max(float(np.abs(exact).max(initial=0.0)), 1e-12)
    shown, order = exact.copy(), np.argsort(exact, kind="stable")
    breaks = np.flatnonzero(np.diff(exact[order]) > 0.01 * width) + 1
    for group in np.split(order, breaks):
        members = np.sort(group)
        if len(members) > 1:
            places = np.arange(len(members)) - (len(members) - 1) / 2
            shown[members] = exact[members].mean() + 0.025 * width * places
    return shown


def point_style(color: str) -> dict[str, Any]:
    """Scatter options of a plain point."""
    return {"color": color, "s": 26, "alpha": 0.75, "linewidths": 0, "zorder": 3}


def seed_colors(seeds: Sequence[int]) -> dict[int, str]:
    """A colour a seed while they can be told apart, else one for all."""
    if len(seeds) > len(COLORS):
        return dict.fromkeys(seeds, BLUE)
    return dict(zip(seeds, COLORS, strict=False))
