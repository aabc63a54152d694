"""What finished cells found, read back from their run folders alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from qratk.compare.grid import FAILURE, OWN, FailureDocument, read_compared
from qratk.core.configuration import Configuration, Knob, LayerChoice
from qratk.core.evaluation import Evaluation
from qratk.core.result import Record
from qratk.run.document import EvaluationEntry, ResultDocument, Settings, read_document
from qratk.run.run import Run
from qratk.settings.names import named_document
from qratk.settings.sweeps import SweepPoint

Array = NDArray[np.float64]
UNFINISHED: Final = ("not finished", "not begun")


@dataclass(frozen=True)
class Outcome:
    """A finished cell: what its search ended with, its records in order (without outcomes by item), its settings.

    `items` are the validation outcomes of its best, in the items' order, means over fresh seeds where it was confirmed;
    empty where unknown.
    """

    recipe: str
    budget: str
    seed: int
    result: ResultDocument = field(repr=False)
    records: tuple[Record, ...] = field(default=(), repr=False)
    settings: Settings = field(default_factory=lambda: Settings({}), repr=False)
    items: tuple[float, ...] = field(default=(), repr=False)

    @property
    def best(self) -> EvaluationEntry:
        """The answer."""
        return self.result.best

    @property
    def test(self) -> Mapping[str, float]:
        """Test metrics of the best; empty where it was not tested."""
        return self.result.tested(self.best)

    @property
    def validation(self) -> float:
        """Score on the validation items, which the search saw; the mean over fresh seeds where it was confirmed."""
        confirmed = self.result.confirmed
        return self.best.score if confirmed is None else confirmed.mean

    @property
    def score(self) -> float:
        """What recipes are compared by: the test score, or the validation score where there is none."""
        return self.test.get("score", self.validation)

    @property
    def top(self) -> int:
        """T_S."""
        return self.result.problem.steps[-1]

    @property
    def limit(self) -> int:
        """Budget in bytes."""
        return self.result.problem.limit_bytes

    @cached_property
    def searched(self) -> tuple[Record, ...]:
        """Records without references and replicates with fresh seeds, which answer other questions."""
        return tuple(record for record in self.records if record.searched)

    @cached_property
    def high(self) -> tuple[Evaluation, ...]:
        """Successful evaluations at T_S."""
        return tuple(e for e in (r.evaluation for r in self.searched) if e.steps == self.top and e.ok)

    @cached_property
    def varied(self) -> tuple[Evaluation, ...]:
        """Successful evaluations at T_S but for the uniform ones, which span more than any choice would."""
        varied = (r.evaluation for r in self.searched if r.candidate.phase != "baseline")
        return tuple(e for e in varied if e.steps == self.top and e.ok)

    @property
    def high_fidelity(self) -> int:
        """Evaluations at T_S, failed ones too."""
        return sum(record.evaluation.steps == self.top for record in self.searched)

    @property
    def proxy(self) -> str:
        """What the lowest rung scores by in place of a training; "" where it trains."""
        return self.result.problem.proxy

    @cached_property
    def costs(self) -> Array:
        """Steps trained up to and with each searched evaluation, in units of T_S; a training's steps count once."""
        effort, costs = self.result.problem.effort(), []
        for record in self.searched:
            effort.add(record.evaluation)
            costs.append(effort.full_runs)
        return np.array(costs)

    @property
    def cost(self) -> float:
        """Full runs that the search took, those with fresh seeds among them."""
        return (float(self.costs[-1]) if len(self.costs) else 0.0) + self.confirming

    @property
    def confirming(self) -> float:
        """Full runs with fresh seeds."""
        effort = self.result.problem.effort(shared=False)
        for record in self.records:
            if record.evaluation.replicate:
                effort.add(record.evaluation)
        return effort.full_runs

    @property
    def budget_runs(self) -> float | None:
        """Full runs that the search was given to spend; None where it was given no number."""
        found = self.settings.section("search").get("full_runs")
        return None if found is None else float(found)

    @property
    def scorings(self) -> int:
        """Passes over the validation items: those of fresh seeds and of means of several trainings, too."""
        return sum(record.candidate.phase != "reference" for record in self.records) + self.result.averages

    @property
    def tunes(self) -> bool:
        """Whether shared settings were tried."""
        return any(len(values) > 1 for values in self.result.problem.shared.values())

    @property
    def tuning(self) -> float:
        """Full runs of these that tried settings: what the same layers were trained beyond their longest training."""
        trained: dict[str, tuple[Configuration, int]] = {}
        for evaluation in (record.evaluation for record in self.searched):
            first, steps = trained.get(evaluation.training, (evaluation.configuration, 0))
            trained[evaluation.training] = first, max(steps, evaluation.steps)
        by_layers: dict[tuple[LayerChoice, ...], list[int]] = {}
        for configuration, steps in trained.values():
            by_layers.setdefault(configuration.layers, []).append(steps)
        return sum(sum(steps) - max(steps) for steps in by_layers.values()) / self.top

    @property
    def seconds(self) -> float:
        """Seconds in all."""
        return self.result.seconds.get("total") or np.nan

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers."""
        return self.result.problem.layers

    @property
    def ladders(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Bits and ranks that were searched."""
        return self.result.problem.bits, self.result.problem.ranks

    def importance(self, knob: Knob) -> Array:
        """Raw importance of the layers for a knob, (L,)."""
        importance = self.result.problem.importance
        return np.array(importance.bits if knob == "bits" else importance.rank, dtype=np.float64)

    @property
    def task_metrics(self) -> Mapping[str, str]:
        """The metric of each task that test data are judged by, where the settings name it."""
        options = self.settings.section("data").get("init_args")
        tasks = options.get("test") if isinstance(options, Mapping) else None
        if not isinstance(tasks, Mapping):
            return {}
        named = {str(name): task.get("metric") for name, task in tasks.items() if isinstance(task, Mapping)}
        return {name: str(metric) for name, metric in named.items() if metric}

    @property
    def item_weights(self) -> Sequence[float] | None:
        """Weights of the validation items; None when they are equal."""
        return self.result.item_weights


@dataclass(frozen=True)
class Failed:
    """A cell without a result, and why."""

    recipe: str
    budget: str
    seed: int
    reason: str


@dataclass(frozen=True)
class Cells:
    """All cells of a folder.

    Args:
        base: name of the base's recipe; empty when it is not compared.
        recipes: names in the order they were given, and whether they have budgets of their own.
        budgets: labels of the budgets compared.
        outcomes: finished cells.
        failed: failed and unfinished cells.
        sweeps: the recipes that are points of a sweep.
    """

    base: str
    recipes: Mapping[str, bool]
    budgets: tuple[str, ...]
    outcomes: tuple[Outcome, ...]
    failed: tuple[Failed, ...] = ()
    sweeps: Mapping[str, SweepPoint] = field(default_factory=dict)

    def at(self, budget: str) -> Cells:
        """The part of one budget; recipes with budgets of their own are in every part."""
        own = {name for name, own in self.recipes.items() if own}

        def belongs(cell: Outcome | Failed) -> bool:
            return cell.recipe in own if cell.recipe in own else cell.budget == budget

        outcomes = tuple(outcome for outcome in self.outcomes if belongs(outcome))
        failed = tuple(cell for cell in self.failed if belongs(cell))
        return Cells(self.base, self.recipes, (budget,), outcomes, failed, self.sweeps)

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


def read_cells(folder: Path) -> Cells:
    """What a folder holds by now; raises `RunDirectoryError`."""
    compared = read_compared(folder)
    recipes = {name: entry.own_budget for name, entry in compared.recipes.items()}
    outcomes: list[Outcome] = []
    failed: list[Failed] = []
    for recipe, own in recipes.items():
        for label in [OWN] if own else compared.budgets:
            for path in _seed_folders(folder / recipe / label):
                cell = read_cell(path, recipe, label, int(path.name))
                (outcomes if isinstance(cell, Outcome) else failed).append(cell)  # type: ignore[arg-type]
    sweeps = {name: entry.sweep for name, entry in compared.recipes.items() if entry.sweep is not None}
    return Cells(compared.base, recipes, compared.budgets, tuple(outcomes), tuple(failed), sweeps)


def read_cell(folder: Path, recipe: str, budget: str, seed: int) -> Outcome | Failed:
    """A cell from its run folder; raises `RunDirectoryError`."""
    run = Run(folder)
    if not run.finished:
        return Failed(recipe, budget, seed, _why(run))
    settings = Settings(named_document(run.settings.document))
    best, result = run.best, run.result
    items = () if best is None else _items(best, [record.evaluation for record in run.records])
    return Outcome(recipe, budget, seed, result, tuple(map(_light, run.records)), settings, items)


def _items(best: Evaluation, measured: Sequence[Evaluation]) -> tuple[float, ...]:
    """Outcomes of the best by item: the means of its replicates, if there are any."""
    fresh = [e.outcomes for e in measured if e.replicate and e.ok and e.configuration == best.configuration]
    if not fresh or len({len(outcomes) for outcomes in fresh}) > 1:
        return best.outcomes
    return tuple(np.mean(fresh, axis=0).tolist())


def _light(record: Record) -> Record:
    """The record without its outcomes: hundreds of cells are held at once."""
    return replace(record, evaluation=replace(record.evaluation, outcomes=()))


def _why(run: Run) -> str:
    path = run.folder / FAILURE
    if path.exists():
        return read_document(FailureDocument, path).reason
    return UNFINISHED[0] if run.begun else UNFINISHED[1]


def _seed_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))
