"""Recipes side by side: means over seeds, and differences paired by seed."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from qratk.compare.read import UNFINISHED, Cells, Failed, Limits, Outcome
from qratk.core.errors import ConfigurationError
from qratk.core.memory import format_bytes
from qratk.core.shared import REPLICATE, shared_text
from qratk.core.text import clean, duration
from qratk.loop.statistics import hierarchical_interval, mean_interval
from qratk.run.atomic import write_atomically

ACCURACY: Final = ("acc", "accuracy")
NAN: Final = float("nan")
TIE: Final = 1e-4
"""Scores nearer than this are tied: training side by side moves the score of the same configuration by some 1e-5."""


@dataclass(frozen=True)
class Difference:
    """A recipe minus the reference, paired by seed: mean, interval over seeds, and who won."""

    seeds: int = 0
    mean: float = NAN
    low: float = NAN
    high: float = NAN
    validation: float = NAN
    validation_low: float = NAN
    validation_high: float = NAN
    wins: int = 0
    ties: int = 0
    losses: int = 0


@dataclass(frozen=True)
class RecipeRow:
    """A recipe under a budget; means over its finished seeds, standard deviations where they say so.

    `over` says that its answer takes more bytes than the reference's budget allows. `cost` are the full runs of
    training, `confirming` those of them with fresh seeds. Where settings were tuned, `settings` are those of most
    answers, `tuning` the full runs that tried others, and `scorings` how often something was scored.
    """

    recipe: str
    budget: str
    seeds: int
    failed: int
    score: float = NAN
    score_sd: float = NAN
    validation: float = NAN
    validation_sd: float = NAN
    accuracy: float = NAN
    accuracy_sd: float = NAN
    storage_bytes: float = NAN
    training_bytes: float = NAN
    average_bits: float = NAN
    average_rank: float = NAN
    high_fidelity: float = NAN
    cost: float = NAN
    seconds: float = NAN
    tuning: float = NAN
    scorings: float = NAN
    confirming: float = NAN
    given_runs: float = NAN
    settings: str = ""
    over: bool = False
    best: bool = False
    reference: bool = False
    difference: Difference = field(default_factory=Difference)
    metrics: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""


def reference_name(cells: Cells, given: str | None = None) -> str:
    """The recipe that others are compared with: the given one, the base, or the first; raises if it is unknown."""
    if given is not None and given not in cells.recipes:
        raise ConfigurationError(f"--reference: no recipe is called {given!r}; there are {', '.join(cells.recipes)}")
    return given or cells.base or next(iter(cells.recipes), "")


def rows(cells: Cells, reference: str) -> list[RecipeRow]:
    """Rows of all budgets, the budgets in the order given, best mean first; failed recipes last."""
    found: list[RecipeRow] = []
    for budget in cells.budgets:
        found += _rows_at(cells.at(budget), budget, reference)
    return found


def _rows_at(part: Cells, budget: str, reference: str) -> list[RecipeRow]:
    against = {outcome.seed: outcome for outcome in part.of(reference)}
    limits = Limits.of(part.of(reference))
    made = [_row(part, name, budget, against, limits, reference) for name in part.recipes]
    made = [row for row in made if row.seeds or row.failed]
    fitting = [row for row in made if row.seeds and not row.over]
    most = max((row.seeds for row in fitting), default=0)  # a mean over fewer seeds is of other problems
    top = max((row.score for row in fitting if row.seeds == most), default=NAN)
    made = [replace(row, best=row in fitting and row.seeds == most and row.score == top) for row in made]
    return sorted(made, key=lambda row: (row.seeds == 0, -row.score if row.seeds else 0.0))


def _row(
    part: Cells, name: str, budget: str, against: Mapping[int, Outcome], limits: Limits, reference: str
) -> RecipeRow:
    cells = part.of(name)
    failed = [cell for cell in part.failed if cell.recipe == name]
    reason = failed[0].reason if failed else ""
    if not cells:
        return RecipeRow(name, budget, 0, len(failed), reason=reason)
    accuracies = [next((c.test[key] for key in ACCURACY if key in c.test), NAN) for c in cells]
    metrics = {key: _mean([c.test.get(key, NAN) for c in cells]) for key in metric_names(cells)}
    return RecipeRow(
        recipe=name,
        budget=budget,
        seeds=len(cells),
        failed=len(failed),
        score=_mean([c.score for c in cells]),
        score_sd=_sd([c.score for c in cells]),
        validation=_mean([c.validation for c in cells]),
        validation_sd=_sd([c.validation for c in cells]),
        accuracy=_mean(accuracies),
        accuracy_sd=_sd(accuracies),
        storage_bytes=_mean([c.best.storage_bytes for c in cells]),
        training_bytes=_mean([c.best.training_bytes for c in cells]),
        average_bits=_mean([c.best.average_bits for c in cells]),
        average_rank=_mean([c.best.average_rank for c in cells]),
        high_fidelity=_mean([c.high_fidelity for c in cells]),
        cost=_mean([c.cost for c in cells]),
        seconds=_mean([c.seconds for c in cells]),
        tuning=_mean([c.tuning for c in cells if c.tunes]),
        scorings=_mean([float(c.scorings) for c in cells if c.tunes or c.budget_runs is not None]),
        confirming=_mean([c.confirming for c in cells]),
        given_runs=_mean([NAN if c.budget_runs is None else c.budget_runs for c in cells]),
        settings=_settings(cells),
        over=any(limits.exceeded(c.best.bytes, c.seed) for c in cells),
        reference=name == reference,
        difference=difference(cells, against) if name != reference else Difference(),
        metrics=metrics,
        reason=reason,
    )


def _settings(cells: Sequence[Outcome]) -> str:
    """The shared settings of most answers, and of how many; empty where none were tuned."""
    settings = (c.best.configuration.shared for c in cells if c.tunes)
    counts = Counter(shared_text(tuple(pair for pair in own if pair[0] != REPLICATE)) for own in settings)
    text, count = counts.most_common(1)[0] if counts else ("", 0)
    return text + (f" ({count} of {len(cells)})" if 0 < count < len(cells) else "")


def difference(cells: Sequence[Outcome], against: Mapping[int, Outcome]) -> Difference:
    """Difference of cells to those of the reference with the same seeds."""
    pairs = [(cell, against[cell.seed]) for cell in cells if cell.seed in against]
    if not pairs:
        return Difference()
    scores = [a.score - b.score for a, b in pairs]
    validation = [a.validation - b.validation for a, b in pairs]
    low, high = mean_interval(scores)
    inner = _item_interval(pairs)
    ties = sum(abs(value) <= TIE for value in scores)
    wins = sum(value > TIE for value in scores)
    return Difference(
        len(pairs), _mean(scores), low, high, _mean(validation), *inner, wins, ties, len(pairs) - wins - ties
    )


def _item_interval(pairs: Sequence[tuple[Outcome, Outcome]]) -> tuple[float, float]:
    """Interval over items and seeds of the validation score; NaN where the items do not make up the score."""
    groups, weights = [], []
    for ours, theirs in pairs:
        if not (_explains(ours) and _explains(theirs)) or len(ours.items) != len(theirs.items):
            return NAN, NAN
        groups.append(np.asarray(ours.items) - np.asarray(theirs.items))
        weights.append(ours.item_weights)
    return hierarchical_interval([group.tolist() for group in groups], weights)


def _explains(outcome: Outcome) -> bool:
    if not outcome.items:
        return False
    mean = np.average(outcome.items, weights=outcome.item_weights)
    return math.isclose(mean, outcome.validation, rel_tol=1e-5, abs_tol=1e-6)


def metric_names(cells: Sequence[Outcome]) -> tuple[str, ...]:
    """Names of the test metrics, `score` first."""
    names = dict.fromkeys(name for cell in cells for name in cell.test)
    return tuple(sorted(names, key=lambda name: name != "score"))


def _mean(values: Sequence[float]) -> float:
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()) if array.size and not np.isnan(array).all() else NAN


def _sd(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else NAN


# Files

CSV_COLUMNS: Final[Mapping[str, Callable[[RecipeRow], Any]]] = {
    "recipe": lambda r: r.recipe,
    "budget": lambda r: r.budget,
    "seeds": lambda r: r.seeds,
    "failed": lambda r: r.failed,
    "best": lambda r: int(r.best),
    "reference": lambda r: int(r.reference),
    "over_budget": lambda r: int(r.over),
    "score": lambda r: r.score,
    "score_sd": lambda r: r.score_sd,
    "validation_score": lambda r: r.validation,
    "validation_score_sd": lambda r: r.validation_sd,
    "accuracy": lambda r: r.accuracy,
    "accuracy_sd": lambda r: r.accuracy_sd,
    "storage_bytes": lambda r: r.storage_bytes,
    "training_bytes": lambda r: r.training_bytes,
    "average_bits": lambda r: r.average_bits,
    "average_rank": lambda r: r.average_rank,
    "high_fidelity_evaluations": lambda r: r.high_fidelity,
    "full_runs": lambda r: r.cost,
    "seconds": lambda r: r.seconds,
    "difference": lambda r: r.difference.mean,
    "difference_low": lambda r: r.difference.low,
    "difference_high": lambda r: r.difference.high,
    "validation_difference": lambda r: r.difference.validation,
    "validation_difference_low": lambda r: r.difference.validation_low,
    "validation_difference_high": lambda r: r.difference.validation_high,
    "paired_seeds": lambda r: r.difference.seeds,
    "wins": lambda r: r.difference.wins,
    "ties": lambda r: r.difference.ties,
    "losses": lambda r: r.difference.losses,
    "reason": lambda r: r.reason,
}
TUNED_COLUMNS: Final[Mapping[str, Callable[[RecipeRow], Any]]] = {
    "settings": lambda r: r.settings,
    "tuning_runs": lambda r: r.tuning,
    "scorings": lambda r: r.scorings,
}
"""Besides, where settings were tuned."""
EFFORT_COLUMNS: Final[Mapping[str, Callable[[RecipeRow], Any]]] = {
    "given_runs": lambda r: r.given_runs,
    "fresh_seed_runs": lambda r: r.confirming,
}
"""Besides, where full runs were given out, or spent on fresh seeds."""


def to_csv(heads: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """A table as CSV; figures that are not known are empty."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(heads)
    for line in lines:
        writer.writerow(["" if isinstance(cell, float) and math.isnan(cell) else cell for cell in line])
    return buffer.getvalue()


def write_tables(cells: Cells, made: Sequence[RecipeRow], folder: Path) -> list[Path]:
    """Write table.csv, cells.csv and table.md; their paths."""
    columns = {**CSV_COLUMNS, **(TUNED_COLUMNS if any(row.settings for row in made) else {})}
    columns |= EFFORT_COLUMNS if any(map(_spends, made)) else {}
    texts = {
        "table.csv": to_csv(list(columns), [[get(row) for get in columns.values()] for row in made]),
        "cells.csv": cells_csv(cells),
        "table.md": table_markdown(cells, made),
    }
    for name, text in texts.items():
        write_atomically(folder / name, text)
    return [folder / name for name in texts]


def _spends(row: RecipeRow) -> bool:
    """Whether full runs were given out, or spent on fresh seeds."""
    return row.given_runs == row.given_runs or row.confirming > 0


def cells_csv(cells: Cells) -> str:
    """One row a cell, failed ones too."""
    metrics = metric_names(cells.outcomes)
    heads = [
        "recipe", "budget", "seed", "status", "reason", "validation_score", *(f"test_{name}" for name in metrics),
        "storage_bytes", "budget_bytes", "average_bits", "average_rank", "high_fidelity_evaluations", "full_runs",
        "evaluations", "failed_evaluations", "seconds", "configuration",
    ]  # fmt: skip
    order = {name: number for number, name in enumerate(cells.recipes)}
    every: list[Outcome | Failed] = [*cells.outcomes, *cells.failed]
    every.sort(key=lambda cell: (order[cell.recipe], cell.budget, cell.seed))
    lines = [
        _finished_line(cell, metrics) if isinstance(cell, Outcome) else _failed_line(cell, len(heads)) for cell in every
    ]
    return to_csv(heads, lines)


def _finished_line(o: Outcome, metrics: Sequence[str]) -> list[Any]:
    return [
        o.recipe, o.budget, o.seed, "finished", "", o.validation, *(o.test.get(name, NAN) for name in metrics),
        o.best.storage_bytes, o.limit, o.best.average_bits, o.best.average_rank, o.high_fidelity, o.cost,
        len(o.searched), o.result.failed_evaluations, o.seconds, o.best.configuration,
    ]  # fmt: skip


def _failed_line(cell: Failed, columns: int) -> list[Any]:
    state = [cell.reason, ""] if cell.reason in UNFINISHED else ["failed", clean(cell.reason)]
    return [cell.recipe, cell.budget, cell.seed, *state, *[""] * (columns - 5)]


# Text

NAME, SEEDS, SCORE = "recipe", "n", "test score"
_NARROW: Final = (NAME, SEEDS, SCORE, "bytes", "bits", "HF", "difference [95 %]", "w/t/l")


def text_row(row: RecipeRow) -> dict[str, str]:
    """A row as text, by the heads of the columns; what is not known of a row without a result is left out."""
    name = row.recipe + (" (reference)" if row.reference else "") + (" †" if row.over else "")
    if not row.seeds:
        state = row.reason if row.reason in UNFINISHED else "failed"
        return {NAME: name, SEEDS: f"0 of {row.failed}", SCORE: state}
    d = row.difference
    return {
        NAME: name,
        SEEDS: str(row.seeds) + (f" of {row.seeds + row.failed}" if row.failed else ""),
        SCORE: plus_minus(row.score, row.score_sd),
        "validation": plus_minus(row.validation, row.validation_sd),
        "acc": plus_minus(row.accuracy, row.accuracy_sd),
        "bytes": format_bytes(row.storage_bytes),
        "bits": number(row.average_bits, 2),
        "rank": number(row.average_rank, 1),
        "HF": number(row.high_fidelity, 1),
        "runs": number(row.cost, 1) + ("" if math.isnan(row.given_runs) else f" of {row.given_runs:g}"),
        "fresh": number(row.confirming, 1) if _spends(row) else "",
        "tuning": number(row.tuning, 1),
        "scored": number(row.scorings, 0),
        "settings": row.settings,
        "time": duration(row.seconds),
        "difference [95 %]": interval(d.mean, d.low, d.high),
        "validation [95 %]": interval(d.validation, d.validation_low, d.validation_high),
        "w/t/l": f"{d.wins}/{d.ties}/{d.losses}" if d.seeds else "",
    }


def number(value: float, digits: int = 4) -> str:
    """A figure; a dash when it is not known."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def plus_minus(mean: float, sd: float) -> str:
    """Mean and standard deviation over seeds."""
    return number(mean) + ("" if math.isnan(sd) else f" ± {sd:.4f}")


def interval(mean: float, low: float, high: float) -> str:
    """A difference and its interval."""
    if math.isnan(mean):
        return ""
    return f"{mean:+.4f}" + ("" if math.isnan(low) else f" [{low:+.4f}, {high:+.4f}]")


def known_columns(lines: Sequence[Mapping[str, str]], *, narrow: bool = False) -> list[str]:
    """Heads of the columns in which a line says something; of the most important ones if narrow."""
    heads = _NARROW if narrow else dict.fromkeys(head for line in lines for head in line)
    told = [head for head in heads if any(line.get(head, "") not in ("", "-") for line in lines)]
    return [head for head in heads if head in (NAME, SEEDS, SCORE) or head in told]


def markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table as Markdown."""
    text = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return (
        "\n".join(text + ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]) + "\n"
    )


def by_budget(made: Sequence[RecipeRow]) -> dict[str, list[RecipeRow]]:
    """Rows of each budget."""
    groups: dict[str, list[RecipeRow]] = {}
    for row in made:
        groups.setdefault(row.budget, []).append(row)
    return groups


def table_markdown(cells: Cells, made: Sequence[RecipeRow]) -> str:
    """`table.md`: one table a budget, the best in bold."""
    parts = []
    for budget, group in by_budget(made).items():
        lines = [text_row(row) for row in group]
        columns = known_columns(lines)
        shown = [
            [f"**{line[head]}**" if row.best and head in (NAME, SCORE) else line.get(head, "") for head in columns]
            for row, line in zip(group, lines, strict=True)
        ]
        parts.append(f"## {budget_title(budget)}\n\n{markdown(columns, shown)}")
    failed = "".join(f"- {line}\n" for line in failure_lines(cells.failed))
    return "\n".join([*parts, legend(made)]) + (f"\nWithout a result (budget/seed):\n\n{failed}" if failed else "")


def budget_title(budget: str) -> str:
    """A budget's label for people."""
    words = budget.split("-")
    if words[0] == "like":
        return f"Budget: what uniform {words[1]} bit, rank {words[2]} takes"
    return "Budget: the base's own" if budget == "own" else f"Budget: {budget}"


def legend(made: Sequence[RecipeRow]) -> str:
    """What the columns mean."""
    name = next((row.recipe for row in made if row.reference), "")
    lines = [
        "n: seeds. Scores: mean ± standard deviation over seeds, on test data and on the validation data that the "
        "search saw. HF: evaluations at the highest rung. runs: cost in full runs, continued training counted once.",
    ]
    if name:
        lines.append(
            f"difference: test score minus that of {name}, paired by seed, with a bootstrap 95 % interval over seeds; "
            "validation: the same for the validation score, over seeds and items. w/t/l: seeds won, tied (within "
            f"{TIE:g}, which training side by side may add), lost."
        )
    if 0 < max((row.difference.seeds for row in made), default=0) < 5:
        lines.append("With fewer than 5 seeds an interval over seeds is narrower than it says.")
    if any(row.settings for row in made):
        lines.append(
            "settings: those of most answers. tuning: what trying other settings for the same layers took of the runs. "
            "scored: passes over the validation items besides the runs, of evaluations and of means of trainings."
        )
    if any(map(_spends, made)):
        lines.append(
            "fresh: of the runs those with fresh seeds, by whose mean the answer is then chosen; validation is that "
            "mean. Runs are of training alone; scoring is apart."
        )
    if any(row.over for row in made):
        lines.append("†: takes more than the reference's budget.")
    return "\n".join(lines) + "\n"


def failure_lines(failed: Sequence[Failed]) -> list[str]:
    """Cells without a result, those of a recipe with the same reason on one line."""
    groups: dict[tuple[str, str], list[str]] = {}
    for cell in failed:
        groups.setdefault((cell.recipe, clean(cell.reason)), []).append(f"{cell.budget}/{cell.seed}")
    return [f"{recipe} ({', '.join(cells)}): {reason}" for (recipe, reason), cells in groups.items()]
