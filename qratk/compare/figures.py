"""All figures of a comparison, each as PNG and CSV; what cannot be drawn is said in one line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from qratk.compare import problem_figures, search_figures
from qratk.compare.drawing import Drawing, NoDataError, Picture, View
from qratk.compare.read import Cells
from qratk.compare.table import to_csv
from qratk.core.work import counted
from qratk.reporters.figures import to_png
from qratk.run.atomic import write_atomically

DRAWINGS: Final[Mapping[str, Drawing]] = {
    "1a_spread": problem_figures.spread,
    "1b_proxies": problem_figures.proxies,
    "3_allocation": problem_figures.allocation,
    "4_surrogate": search_figures.surrogate,
    "5_efficiency": search_figures.efficiency,
    "5_target": search_figures.target,
    "6_ablation": search_figures.ablation,
    "7_importance": problem_figures.importance,
    "8_repair": problem_figures.repair,
    "9_sensitivity": search_figures.sensitivity,
    "10_sweeps": search_figures.sweep_curves,
}
"""Names of files, which begin with the number of the figure in the paper, and what draws them."""


def draw_all(cells: Cells, reference: str, folder: Path, *, target: float | None = None) -> Iterator[str]:
    """Draw every figure for every budget; yields a line about each that could not be drawn, and one at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = 0
    for budget in cells.budgets:
        view = View(cells.at(budget), reference, target)
        suffix = f"_{budget}" if len(cells.budgets) > 1 else ""
        for name, draw in counted("drawing figures", tuple(DRAWINGS.items())):
            try:
                _write(draw(view), folder / f"{name}{suffix}")
                drawn += 1
            except NoDataError as reason:
                for ending in (".png", ".csv"):  # of an earlier report
                    (folder / f"{name}{suffix}{ending}").unlink(missing_ok=True)
                yield f"figure {name}{suffix} skipped: {reason}"
    yield f"figures: {drawn} in {folder}"


def _write(picture: Picture, path: Path) -> None:
    write_atomically(path.with_name(path.name + ".png"), to_png(picture.figure))
    write_atomically(path.with_name(path.name + ".csv"), to_csv(picture.heads, picture.lines))
