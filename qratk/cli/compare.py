"""`qratk compare`: recipes x budgets x seeds, resumable, in one table with figures."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qratk.cli.shipped import configuration, recipes
from qratk.compare.grid import Grid
from qratk.compare.paper import PaperTable, notes, paper_tables, shown, write_paper_tables
from qratk.compare.read import UNFINISHED, read_cells
from qratk.compare.run import run_grid
from qratk.compare.table import (
    NAME,
    SCORE,
    RecipeRow,
    budget_title,
    by_budget,
    failure_lines,
    known_columns,
    legend,
    reference_name,
    rows,
    text_row,
    write_tables,
)

if TYPE_CHECKING:
    from rich.console import Console

_DESCRIPTION = """\
Run a search for every recipe, budget and seed, and tell them apart in one table and the paper's figures.

A recipe is a YAML file laid over the base, usually with a `search:` section only; its name is the file's stem. Those
that travel with the package go by name: --config quickstart --recipes qlora adalora, or all of --recipes baselines. A
cell is `qratk search --config BASE --config RECIPE` with a seed. Cells that are finished are only read, begun ones are
continued. Settings for all cells are given by their path: --model.model=DIR --search.generations=5"""

_WIDTH: Final = 240  # of what is printed to a file
_NARROW: Final = 160


def compare(arguments: Sequence[str]) -> int:
    """Exit status of `qratk compare`: 0 when all cells are finished, 1 when some failed, 130 when interrupted."""
    parser = _parser()
    given, extra = parser.parse_known_args(arguments)
    _check(parser, given, extra)
    if given.only_report:
        return report(given.run_dir, given.reference, figures=not given.no_figures, target=given.target)
    configs = [Path(configuration(name)) for name in given.config]
    grid = Grid.of(
        given.run_dir,
        configs,
        recipes(given.recipes),
        given.budgets,
        given.seeds,
        sweeps=[Path(configuration(name)) for name in given.sweep],
        extra=extra,
        tune=given.tune,
        runs=given.runs,
        base=not given.no_base,
    )
    if given.reference is not None and given.reference not in {recipe.name for recipe in grid.recipes}:
        parser.error(f"--reference {given.reference}: there is no such recipe")
    if given.dry_run:
        return _dry_run(grid)
    from qratk.cli.search import search

    try:
        run_grid(grid, search, jobs=given.jobs, full_reports=given.full_reports)
    except KeyboardInterrupt:
        print(f"interrupted; to go on: {shlex.join(['qratk', 'compare', *arguments])}", file=sys.stderr)
        return 130
    return report(given.run_dir, given.reference, figures=not given.no_figures, target=given.target)


def report(folder: Path, reference: str | None = None, *, figures: bool = True, target: float | None = None) -> int:
    """Write the tables and figures of what a folder holds, and print the table; 1 when a cell has failed.

    `target` is the quantile of the scores at T_S that Fig. 5 asks for; by default what the random recipe ends with.
    """
    cells = read_cells(folder)
    against = reference_name(cells, reference)
    made = rows(cells, against)
    print_table(made)
    told = paper_tables(cells, made)
    for table in told:
        if table.suite and table.rows:
            print_paper_table(table)
    for line in failure_lines(cells.failed):
        print(f"no result: {line}")
    paths = [*write_tables(cells, made, folder), *write_paper_tables(told, folder)]
    print(f"tables: {', '.join(str(path) for path in paths)}")
    if figures and cells.outcomes:
        from qratk.compare.figures import draw_all

        print(*list(draw_all(cells, against, folder / "figures", target=target)), sep="\n")
    return int(any(cell.reason not in UNFINISHED for cell in cells.failed))


def print_table(made: Sequence[RecipeRow]) -> None:
    """Print the table; the best of each budget in green."""
    from rich.table import Table
    from rich.text import Text

    console = _console()
    for budget, group in by_budget(made).items():
        lines = [text_row(row) for row in group]
        columns = known_columns(lines, narrow=console.width < _NARROW)
        table = Table(title=Text(budget_title(budget)), title_justify="left")
        for head in columns:
            table.add_column(head, overflow="fold", justify="left" if head in (NAME, SCORE) else "right")
        for row, line in zip(group, lines, strict=True):
            style = "bold green" if row.best else ("red" if not row.seeds else "")
            table.add_row(*(Text(line.get(head, ""), style=style) for head in columns))
        console.print(table)
    print(legend(made))


def print_paper_table(table: PaperTable) -> None:
    """Print the paper's tables of a suite; best figures in green, the next underlined."""
    from rich.table import Table
    from rich.text import Text

    console, styles = _console(), ("", "bold green", "underline")
    for title, heads, lines in shown(table):
        drawn = Table(title=Text(f"{title}. {budget_title(table.budget)}"), title_justify="left")
        for number, head in enumerate(heads):
            drawn.add_column(head, overflow="fold", justify="right" if number else "left")
        for line in lines:
            drawn.add_row(*(Text(cell) if isinstance(cell, str) else Text(cell[0], styles[cell[1]]) for cell in line))
        console.print(drawn)
    print(notes(table))


def _console() -> Console:
    from rich.console import Console

    plain: dict[str, bool] = {"highlight": False, "markup": False, "emoji": False}
    return Console(**plain) if sys.stdout.isatty() else Console(width=_WIDTH, **plain)  # type: ignore[arg-type]


def _dry_run(grid: Grid) -> int:
    counts = Counter(cell.state for cell in grid.cells)
    for cell in grid.cells:
        print(f"{cell.state:<8}  {grid.command(cell)}")
    print(f"{len(grid.cells)} cells: " + ", ".join(f"{count} {state}" for state, count in counts.items()))
    return 0


def _check(parser: argparse.ArgumentParser, given: argparse.Namespace, extra: Sequence[str]) -> None:
    for argument in extra:
        name, given_value, _ = argument.partition("=")
        if not name.startswith("--") or "." not in name or not given_value:
            parser.error(f"unknown argument {argument!r}; a setting of all cells is given as --section.setting=value")
    if not given.only_report and not given.config:
        parser.error("--config is needed: the file that holds model, data and search")
    if given.target is not None and not 0 <= given.target <= 1:
        parser.error(f"--target is a quantile between 0 and 1, got {given.target:g}")
    if given.runs is not None and not 1 <= given.runs < float("inf"):
        parser.error(f"--runs must be at least 1, got {given.runs:g}")
    if given.jobs < 1 or any(seed < 0 for seed in given.seeds):
        parser.error("--jobs must be at least 1 and --seeds at least 0")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "qratk compare", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("--config", action="append", default=[], help="file or name of the base; later ones lie over earlier ones")
    add("--recipes", nargs="+", default=[], help="recipes: files, names, or folders, also 'baselines' and 'ablations'")
    add("--sweep", nargs="+", default=[], help="files {setting: [values]}: each value is a recipe; also 'one_factor'")
    add("--budgets", nargs="+", default=[], help="pairs such as '[4, 16]' or sizes such as 300KiB; default: the base's")
    add(
        "--tune",
        metavar="LADDERS",
        help="settings that every recipe tunes, by the same ladders, as in '{learning_rate: [1e-3, 3e-3, 1e-2]}'",
    )
    add(
        "--runs",
        type=float,
        metavar="N",
        help="full runs of training that every recipe spends in all: a search ends there, and what one leaves goes to "
        "more settings and to fresh seeds of its best few",
    )
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    add("--run_dir", type=Path, required=True, help="folder of the cells, the tables and the figures")
    add("--jobs", type=int, default=1, help="searches side by side, each in a process (default 1)")
    add("--reference", help="recipe that the others are compared with; default: the base")
    add(
        "--target",
        type=float,
        metavar="Q",
        help="quantile of the scores at T_S to reach in Fig. 5; default: random's best",
    )
    add("--no_base", action="store_true", help="leave the base itself out")
    add("--full_reports", action="store_true", help="TensorBoard and pictures of every search too")
    add("--no_figures", action="store_true", help="tables only")
    add("--dry_run", action="store_true", help="print the searches and whether they are finished")
    add("--only_report", action="store_true", help="run nothing; tables and figures of what the folder holds")
    return parser
