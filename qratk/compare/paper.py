"""The tables of the paper: scores with what they take, and figures by task, each with its interval over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qratk.compare.read import Cells, Outcome
from qratk.compare.table import NAN, RecipeRow, budget_title, by_budget, markdown, metric_names, number, to_csv
from qratk.core.memory import format_bytes
from qratk.loop.statistics import mean_over_seeds
from qratk.run.atomic import write_atomically

TASK_SCORE: Final = "/score"
"""End of the name of what a task adds to the score of a suite."""
AVERAGE: Final = "average"
_CSV_HEADS: Final = (
    "budget", "recipe", "over_budget", "average_bits", "average_rank", "storage_bytes", "training_bytes", "figure",
    "metric", "seeds", "mean", "low", "high", "paired_seeds", "difference", "difference_low", "difference_high",
)  # fmt: skip


@dataclass(frozen=True)
class Over:
    """A figure over seeds: its mean, and the 95 % interval by Student's t, NaN of a single seed."""

    seeds: int = 0
    mean: float = NAN
    low: float = NAN
    high: float = NAN

    @classmethod
    def of(cls, values: Sequence[float]) -> Over:
        """Figure of these values, those that are known."""
        known = [value for value in values if not math.isnan(value)]
        return cls(len(known), *mean_over_seeds(known)) if known else cls()

    @property
    def half(self) -> float:
        """Half of the interval's length."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Column:
    """A figure of the tables: the test metric that holds it, the task that it is of, and the task's metric."""

    key: str
    name: str
    metric: str = ""

    @property
    def head(self) -> str:
        """What stands above it."""
        return self.name + (f" ({self.metric})" if self.metric else "")


@dataclass(frozen=True)
class PaperRow:
    """A recipe with its figures in the columns' order, and each minus the reference's, paired by seed."""

    row: RecipeRow
    figures: tuple[Over, ...]
    differences: tuple[Over, ...]

    @property
    def method(self) -> str:
        """Its name, marked where it takes more than the budget."""
        return self.row.recipe + (" †" if self.row.over else "")

    @property
    def resources(self) -> list[str]:
        """Average bits and rank, and stored bytes."""
        row = self.row
        return [number(row.average_bits, 2), number(row.average_rank, 2), format_bytes(row.storage_bytes)]


@dataclass(frozen=True)
class PaperTable:
    """The tables of one budget. Figures of a suite's tasks are told in percent, others as they are."""

    budget: str
    columns: tuple[Column, ...]
    rows: tuple[PaperRow, ...]
    suite: bool
    reference: str

    def texts(self, which: int) -> list[str]:
        """Mean and half interval of a column, recipe by recipe."""
        return [self._text(row.figures[which]) for row in self.rows]

    def ranks(self, which: int) -> list[int]:
        """Of each recipe 1 where its mean is the best of a column, 2 where it is the next, else 0."""
        means = [row.figures[which].mean for row in self.rows]
        order = sorted({mean for mean in means if not math.isnan(mean)}, reverse=True)[:2]
        return [order.index(mean) + 1 if mean in order else 0 for mean in means]

    def difference_texts(self, which: int) -> list[str]:
        """Difference to the reference in a column with its interval, recipe by recipe."""
        return [self._difference(row.differences[which]) for row in self.rows]

    @property
    def digits(self) -> int:
        """Of figures behind the point."""
        return 2 if self.suite else 4

    @property
    def factor(self) -> float:
        """By which figures are multiplied to be told."""
        return 100.0 if self.suite else 1.0

    def _text(self, found: Over) -> str:
        text = number(found.mean * self.factor, self.digits)
        return text if math.isnan(found.half) else f"{text} ± {found.half * self.factor:.{self.digits}f}"

    def _difference(self, found: Over) -> str:
        if math.isnan(found.mean):
            return ""
        mean, low, high = (f"{value * self.factor:+.{self.digits}f}" for value in (found.mean, found.low, found.high))
        return mean if math.isnan(found.low) else f"{mean} [{low}, {high}]"


def paper_columns(cells: Sequence[Outcome]) -> tuple[Column, ...]:
    """Figures of the paper's second table: of a suite the average of the tasks and each of them, else all test metrics,
    or the score alone where nothing was tested."""
    metrics = metric_names(cells)
    tasks = [name.removesuffix(TASK_SCORE) for name in metrics if name.endswith(TASK_SCORE)]
    if not tasks:
        return tuple(Column(name, name) for name in metrics or ("score",))
    used = {name: metric for cell in cells for name, metric in cell.task_metrics.items()}
    return (
        Column("score", AVERAGE),
        *(Column(f"{task}{TASK_SCORE}", task, used.get(task, "")) for task in sorted(tasks)),
    )


def paper_tables(cells: Cells, made: Sequence[RecipeRow]) -> list[PaperTable]:
    """The tables of every budget, of recipes with a result, the best first."""
    tables = []
    for budget, group in by_budget(made).items():
        part = cells.at(budget)
        columns = paper_columns(part.outcomes)
        reference = next((row.recipe for row in group if row.reference), "")
        against = {cell.seed: cell for cell in part.of(reference)}
        rows = [_row(row, part.of(row.recipe), columns, against) for row in group if row.seeds]
        suite = bool(columns) and columns[0].name == AVERAGE
        tables.append(PaperTable(budget, columns, tuple(rows), suite, reference))
    return tables


def _row(
    row: RecipeRow, cells: Sequence[Outcome], columns: Sequence[Column], against: Mapping[int, Outcome]
) -> PaperRow:
    figures = [Over.of([_value(cell, column) for cell in cells]) for column in columns]
    pairs = [] if row.reference else [(cell, against[cell.seed]) for cell in cells if cell.seed in against]
    differences = [Over.of([_value(a, column) - _value(b, column) for a, b in pairs]) for column in columns]
    return PaperRow(row, tuple(figures), tuple(differences))


def _value(cell: Outcome, column: Column) -> float:
    return cell.score if column.key == "score" else cell.test.get(column.key, NAN)


def write_paper_tables(tables: Sequence[PaperTable], folder: Path) -> list[Path]:
    """Write tables.md and tables.csv; their paths."""
    texts = {"tables.md": as_markdown(tables), "tables.csv": as_csv(tables)}
    for name, text in texts.items():
        write_atomically(folder / name, text)
    return [folder / name for name in texts]


def as_csv(tables: Sequence[PaperTable]) -> str:
    """One row for each figure of each recipe, as they were measured."""
    lines: list[list[Any]] = [
        [
            table.budget, one.row.recipe, int(one.row.over), one.row.average_bits, one.row.average_rank,
            one.row.storage_bytes, one.row.training_bytes, column.name, column.metric,
            found.seeds, found.mean, found.low, found.high,
            gap.seeds, gap.mean, gap.low, gap.high,
        ]
        for table in tables
        for one in table.rows
        for column, found, gap in zip(table.columns, one.figures, one.differences, strict=True)
    ]  # fmt: skip
    return to_csv(_CSV_HEADS, lines)


def as_markdown(tables: Sequence[PaperTable]) -> str:
    """`tables.md`: best in bold, second best underlined."""
    parts = []
    for table in tables:
        parts.append(f"# {budget_title(table.budget)}\n")
        parts += [f"## {title}\n\n{markdown(heads, _marked(lines))}" for title, heads, lines in shown(table)]
        parts.append(notes(table))
    return "\n".join(parts)


def notes(table: PaperTable) -> str:
    """What the figures are."""
    unit = "Figures of tasks and their average are in percent. " if table.suite else ""
    over = " †: takes more than the reference's budget." if any(one.row.over for one in table.rows) else ""
    return (
        f"{unit}On test data: means over seeds ± half of the 95 % interval over seeds (Student's t); differences to "
        f"{table.reference or 'the reference'} are paired by seed.{over}\n"
    )


Cell = str | tuple[str, int]
"""Text, with its rank where it is ranked."""


def shown(table: PaperTable) -> list[tuple[str, list[str], list[list[Cell]]]]:
    """Title, heads and lines of each of the tables; a figure that is ranked comes with its rank, 0, 1 or 2."""
    heads = [column.head for column in table.columns]
    texts = [list(zip(table.texts(n), table.ranks(n), strict=True)) for n in range(len(heads))]
    first = next((n for n, column in enumerate(table.columns) if column.key == "score"), 0)
    seeds = [str(one.row.seeds) for one in table.rows]
    gaps = [table.difference_texts(n) for n in range(len(heads))]
    numbered = list(enumerate(table.rows))
    one: list[list[Cell]] = [
        [r.method, seeds[i], texts[first][i], *r.resources, format_bytes(r.row.training_bytes), gaps[first][i]]
        for i, r in numbered
    ]
    two: list[list[Cell]] = [[r.method, *r.resources, *(column[i] for column in texts)] for i, r in numbered]
    score = "Average↑" if table.suite else "Score↑"
    found = [
        (
            "Table 1: scores and resources",
            ["Method", "n", score, "AvgBit↓", "AvgRank", "Mem, stored↓", "Mem, training peak↓", "difference [95 %]"],
            one,
        ),
        (f"Table 2: by {'task' if table.suite else 'test metric'}", ["Method", "Bit", "Rank", "Mem", *heads], two),
    ]
    if table.suite and any(map(any, gaps)):
        lines: list[list[Cell]] = [
            [r.method, *(column[i] for column in gaps)] for i, r in numbered if not r.row.reference
        ]
        found.append((f"Differences to {table.reference} by task", ["Method", *heads], lines))
    return found


def _marked(lines: Sequence[Sequence[Cell]]) -> list[list[str]]:
    marks = ("{}", "**{}**", "<u>{}</u>")
    return [[cell if isinstance(cell, str) else marks[cell[1]].format(cell[0]) for cell in line] for line in lines]
