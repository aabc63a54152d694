"""What finished cells found, read back from their files alone."""

from __future__ import annotations

import csv
import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import yaml
from numpy.typing import NDArray

from qratk.compare.grid import FAILURE, OWN, read_plan
from qratk.core.errors import RunDirectoryError
from qratk.settings.names import named_document

Array = NDArray[np.float64]
UNFINISHED: Final = ("not finished", "not begun")


@dataclass(frozen=True)
class Measured:
    """A row of `evaluations.csv`; the score is NaN where the evaluation failed."""

    phase: str
    generation: int
    origin: str
    bits: tuple[int, ...]
    ranks: tuple[int, ...]
    steps: int
    score: float
    storage_bytes: int
    average_bits: float
    average_rank: float
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether a score was measured."""
        return not np.isnan(self.score)

    @property
    def key(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The configuration."""
        return self.bits, self.ranks


@dataclass(frozen=True)
class Outcome:
    """A finished cell: `result` is its `result.json`, `rows` its evaluations in order, `config` its settings.

    `items` are the validation outcomes of its best, in the items' order, with their weights; empty where unknown.
    """

    recipe: str
    budget: str
    seed: int
    result: Mapping[str, Any]
    rows: tuple[Measured, ...] = field(default=(), repr=False)
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    items: tuple[float, ...] = field(default=(), repr=False)

    @property
    def best(self) -> Mapping[str, Any]:
        """The answer."""
        found: Mapping[str, Any] = self.result["best"]
        return found

    @property
    def test(self) -> Mapping[str, float]:
        """Test metrics of the best; empty where it was not tested."""
        found: Mapping[str, float] = self.result.get("test_scores", {}).get(self.best["configuration"], {})
        return {name: value for name, value in found.items() if value is not None}

    @property
    def validation(self) -> float:
        """Score on the validation items, which the search saw."""
        return float(self.best["score"])

    @property
    def score(self) -> float:
        """What recipes are compared by: the test score, or the validation score where there is none."""
        return float(self.test.get("score", self.validation))

    @property
    def top(self) -> int:
        """T_S."""
        return int(self.result["problem"]["steps"][-1])

    @property
    def limit(self) -> int:
        """Budget in bytes."""
        return int(self.result["problem"]["limit_bytes"])

    @cached_property
    def searched(self) -> tuple[Measured, ...]:
        """Evaluations without references, which answer other questions."""
        return tuple(row for row in self.rows if row.phase != "reference")

    @cached_property
    def high(self) -> tuple[Measured, ...]:
        """Successful evaluations at T_S."""
        return tuple(row for row in self.searched if row.steps == self.top and row.ok)

    @property
    def high_fidelity(self) -> int:
        """Evaluations at T_S, failed ones too."""
        return sum(row.steps == self.top for row in self.searched)

    @property
    def frozen(self) -> bool:
        """Whether the lowest rung trains nothing: it measures the divergence of the frozen model."""
        evaluator = (self.config.get("search") or {}).get("evaluator") or {}
        return bool(evaluator.get("class_path") == "frozen_divergence")

    @cached_property
    def costs(self) -> Array:
        """Steps trained up to and with each searched evaluation, in units of T_S; continued training counts once."""
        steps = self.result["problem"]["steps"]
        free = steps[0] if self.frozen and len(steps) > 1 else 0
        trained: dict[Any, int] = {}
        spent = 0
        costs = []
        for row in self.searched:
            if row.steps != free:
                spent += max(0, row.steps - trained.get(row.key, 0))
                trained[row.key] = max(row.steps, trained.get(row.key, 0))
            costs.append(spent / self.top)
        return np.array(costs)

    @property
    def cost(self) -> float:
        """Full runs that the search took."""
        return float(self.costs[-1]) if len(self.costs) else 0.0

    @property
    def seconds(self) -> float:
        """Seconds in all."""
        return float(self.result.get("seconds", {}).get("total") or np.nan)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers."""
        return tuple(self.result["problem"]["layers"])

    @property
    def ladders(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Bits and ranks that were searched."""
        problem = self.result["problem"]
        return tuple(problem["bits"]), tuple(problem["ranks"])

    def importance(self, knob: str) -> Array:
        """Raw importance of the layers for "bits" or "rank", (L,)."""
        return np.array(self.result["problem"]["importance"][knob], dtype=np.float64)

    @cached_property
    def best_choice(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Bits and ranks of the best, (L,) each."""
        pairs = [word.partition("*") for word in self.best["configuration"].split()]
        bits, ranks = [], []
        for text, _, times in pairs:
            first, _, second = text.partition(":")
            bits += [int(first)] * int(times or 1)
            ranks += [int(second)] * int(times or 1)
        return np.array(bits), np.array(ranks)

    @property
    def item_weights(self) -> Sequence[float] | None:
        """Weights of the validation items; None when they are equal."""
        found: Sequence[float] | None = self.result.get("item_weights")
        return found


@dataclass(frozen=True)
class Failed:
    """A cell without a result, and why."""

    recipe: str
    budget: str
    seed: int
    reason: str


@dataclass(frozen=True)
class Comparison:
    """All cells of a folder.

    Args:
        base: name of the base's recipe; empty when it is not compared.
        recipes: names in the order they were given, and whether they have budgets of their own.
        budgets: labels of the budgets compared.
        outcomes: finished cells.
        failed: failed and unfinished cells.
    """

    base: str
    recipes: Mapping[str, bool]
    budgets: tuple[str, ...]
    outcomes: tuple[Outcome, ...]
    failed: tuple[Failed, ...] = ()

    def at(self, budget: str) -> Comparison:
        """The part of one budget; recipes with budgets of their own are in every part."""
        own = {name for name, own in self.recipes.items() if own}

        def belongs(cell: Outcome | Failed) -> bool:
            return cell.recipe in own if cell.recipe in own else cell.budget == budget

        outcomes = tuple(outcome for outcome in self.outcomes if belongs(outcome))
        return Comparison(self.base, self.recipes, (budget,), outcomes, tuple(f for f in self.failed if belongs(f)))

    def of(self, recipe: str) -> tuple[Outcome, ...]:
        """Finished cells of a recipe."""
        return tuple(outcome for outcome in self.outcomes if outcome.recipe == recipe)

    @property
    def names(self) -> tuple[str, ...]:
        """Recipes with at least one finished cell."""
        done = {outcome.recipe for outcome in self.outcomes}
        return tuple(name for name in self.recipes if name in done)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of finished cells."""
        return tuple(sorted({outcome.seed for outcome in self.outcomes}))


@dataclass(frozen=True)
class Limits:
    """Budgets in bytes by seed, those of the reference: with layers drawn by seed, "like" means other bytes in each."""

    by_seed: Mapping[int, int]

    @classmethod
    def of(cls, cells: Sequence[Outcome]) -> Limits:
        """Limits of the reference's cells."""
        return cls({cell.seed: cell.limit for cell in cells})

    def exceeded(self, size: float, seed: int) -> bool:
        """Whether a size is over the budget of a seed, or of every seed where that one is unknown."""
        limit = self.by_seed.get(seed, max(self.by_seed.values(), default=None))
        return limit is not None and size > limit


def read_comparison(folder: Path) -> Comparison:
    """What a folder holds by now; raises `RunDirectoryError`."""
    plan = read_plan(folder)
    recipes = {name: bool(facts["own_budget"]) for name, facts in plan["recipes"].items()}
    outcomes: list[Outcome] = []
    failed: list[Failed] = []
    for recipe, own in recipes.items():
        for label in [OWN] if own else plan["budgets"]:
            for path in _seed_folders(folder / recipe / label):
                cell = read_cell(path, recipe, label, int(path.name))
                (outcomes if isinstance(cell, Outcome) else failed).append(cell)  # type: ignore[arg-type]
    return Comparison(plan["base"], recipes, tuple(plan["budgets"]), tuple(outcomes), tuple(failed))


def read_cell(folder: Path, recipe: str, budget: str, seed: int) -> Outcome | Failed:
    """A cell from its files."""
    path = folder / "result.json"
    if not path.exists():
        return Failed(recipe, budget, seed, _why(folder))
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        rows = tuple(_rows(folder / "evaluations.csv"))
        config = named_document(yaml.load((folder / "config.yaml").read_text(encoding="utf-8"), Loader=_LOADER))
    except (OSError, ValueError, KeyError, yaml.YAMLError) as error:
        raise RunDirectoryError(f"the files in {folder} are not those of a finished search: {error}") from error
    items = _items(folder / "journal.sqlite", result["best"])
    return Outcome(recipe, budget, seed, result, rows, config, items)


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _why(folder: Path) -> str:
    path = folder / FAILURE
    if path.exists():
        return str(json.loads(path.read_text(encoding="utf-8"))["reason"])
    return UNFINISHED[0] if (folder / "journal.sqlite").exists() else UNFINISHED[1]


def _seed_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))


def _rows(path: Path) -> Iterable[Measured]:
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            yield Measured(
                phase=row["phase"],
                generation=int(row["generation"]),
                origin=row["origin"],
                bits=tuple(map(int, row["bits"].split())),
                ranks=tuple(map(int, row["ranks"].split())),
                steps=int(row["steps"]),
                score=float(row["score"]) if row["score"] else float("nan"),
                storage_bytes=int(row["storage_bytes"]),
                average_bits=float(row["average_bits"]),
                average_rank=float(row["average_rank"]),
                seconds=float(row["seconds"]),
            )


def _items(path: Path, best: Mapping[str, Any]) -> tuple[float, ...]:
    """Validation outcomes of the best, from the journal; `immutable` since a finished search's is written no more."""
    if not path.exists():
        return ()
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)) as database:
            found = database.execute(
                "SELECT outcomes FROM evaluations WHERE configuration = ? AND steps = ?",
                (best["configuration"], best["steps"]),
            ).fetchone()
    except sqlite3.DatabaseError:
        return ()
    return tuple(json.loads(found[0])) if found else ()
