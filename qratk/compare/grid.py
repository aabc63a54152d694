"""What is compared: recipes, budgets and seeds, and the search that each cell of their grid stands for."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import yaml

from qratk.core.errors import ConfigurationError, RunDirectoryError
from qratk.core.memory import parse_bytes
from qratk.core.plain import flatten
from qratk.core.secrets import without_secrets
from qratk.core.shared import Setting, SharedLadder
from qratk.run import files
from qratk.run.atomic import write_atomically
from qratk.run.document import read_document, read_json, to_json
from qratk.settings.identity import comparable, deciding
from qratk.settings.merge import laid_over
from qratk.settings.names import named_document
from qratk.settings.reading import load, read_settings
from qratk.settings.sweeps import SweepPoint, read_sweeps
from qratk.training.options import check_shared

OWN: Final = "own"
COMPARED: Final = "compare.json"
IDENTITY: Final = "cell.json"
FAILURE: Final = "failure.json"
LOG: Final = "log.txt"
_BUDGETS: Final = "budgets"
_SWEEPS: Final = "sweeps"
_TUNE: Final = "tune.yaml"
_VERSION: Final = 2  # of compare.json: 1 told points of sweeps by the names of their recipes alone


@dataclass(frozen=True, kw_only=True)
class RecipeEntry:
    """What is known of a recipe: whether it has a budget of its own, and the point of a sweep that it is, if any."""

    own_budget: bool
    sweep: SweepPoint | None = None


@dataclass(frozen=True, kw_only=True)
class ComparedDocument:
    """`compare.json`: what was compared in a folder, in the order given; `base` is empty when it was left out."""

    base: str
    recipes: Mapping[str, RecipeEntry]
    budgets: tuple[str, ...]
    version: int = 1


@dataclass(frozen=True, kw_only=True)
class FailureDocument:
    """`failure.json`: why a cell has no result."""

    reason: str


@dataclass(frozen=True)
class BudgetChoice:
    """A budget of the compare command: what a uniform (bits, rank) takes, or a size; neither means the base's own."""

    like: tuple[int, int] | None = None
    limit: str | None = None

    @classmethod
    def parse(cls, text: str) -> BudgetChoice:
        """Budget of "[4, 16]" or "300KiB"; raises `ConfigurationError`."""
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = None
        if isinstance(value, list) and len(value) == 2 and all(isinstance(v, int) for v in value):
            return cls(like=(value[0], value[1]))
        try:
            parse_bytes(text.strip())
        except ConfigurationError:
            raise ConfigurationError(
                f"a budget is a pair [bits, rank], as in '[4, 16]', or a size with a unit, as in 300KiB; got {text!r}"
            ) from None
        return cls(limit=text.replace(" ", ""))

    @property
    def label(self) -> str:
        """Name of the folder and in the table."""
        if self.like is not None:
            return f"like-{self.like[0]}-{self.like[1]}"
        return self.limit or OWN

    @property
    def document(self) -> dict[str, Any]:
        """The overlay; it takes back what the base says, since a budget may be stated once only."""
        return {"search": {"like": None if self.like is None else list(self.like), "limit": self.limit}}


@dataclass(frozen=True)
class Recipe:
    """A named overlay over the base; the base itself has none (`path` is None)."""

    name: str
    path: Path | None = None
    document: Mapping[str, Any] = field(default_factory=dict)
    sweep: SweepPoint | None = None

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """Recipe named by a file's stem; raises `ConfigurationError`."""
        document = read_settings(path)
        if not isinstance(document.get("search", {}), Mapping):
            raise ConfigurationError(f"{path}: 'search' must hold settings")
        return cls(path.stem, path, document)

    @property
    def has_budget(self) -> bool:
        """Whether it states bytes of its own, which no budget of the command overrides."""
        search = self.document.get("search") or {}
        return any(search.get(key) is not None for key in ("like", "limit"))


@dataclass(frozen=True)
class Cell:
    """One search: a recipe under a budget with a seed, in a folder."""

    recipe: Recipe
    budget: BudgetChoice
    seed: int
    folder: Path

    @property
    def label(self) -> str:
        """Budget's name; a recipe with a budget of its own stands under its own."""
        return OWN if self.recipe.has_budget else self.budget.label

    def __str__(self) -> str:
        return f"{self.recipe.name}, budget {self.label}, seed {self.seed}"

    @property
    def finished(self) -> bool:
        """Whether the search has ended."""
        return (self.folder / files.RESULT).exists()

    @property
    def state(self) -> str:
        """'finished', 'failed', 'begun' or 'new'."""
        if self.finished:
            return "finished"
        if (self.folder / FAILURE).exists():
            return "failed"
        return "begun" if (self.folder / files.JOURNAL).exists() else "new"


@dataclass(frozen=True)
class Grid:
    """Base files and settings, recipes, budgets and seeds, in a folder.

    Args:
        folder: where all is written.
        configs: files of the base, later ones over earlier ones.
        recipes: what is compared.
        budgets: budgets of the command; empty where the base's own holds.
        seeds: seeds of the searches.
        extra: arguments of the form --section.setting=value for all cells, over the base and under the recipe.
        tune: shared settings, by name with their ladders, that every recipe tunes: over the recipe.
        runs: full runs of training that every recipe spends in all; None for as many as it takes by itself.
    """

    folder: Path
    configs: tuple[Path, ...]
    recipes: tuple[Recipe, ...]
    budgets: tuple[BudgetChoice, ...]
    seeds: tuple[int, ...]
    extra: tuple[str, ...] = ()
    tune: Mapping[str, Sequence[Setting]] = field(default_factory=dict)
    runs: float | None = None

    @classmethod
    def of(
        cls,
        folder: Path,
        configs: Sequence[Path],
        recipes: Sequence[Path],
        budgets: Sequence[str],
        seeds: Sequence[int],
        *,
        sweeps: Sequence[Path] = (),
        extra: Sequence[str] = (),
        tune: str | None = None,
        runs: float | None = None,
        base: bool = True,
    ) -> Grid:
        """The grid of a command line; with `base`, the base is the first recipe. Raises `ConfigurationError`."""
        documents = [read_settings(path) for path in configs]
        found = [Recipe.read(path) for path in recipes]
        for path in sweeps:
            for swept in read_sweeps(path):
                name = swept.point.name
                found.append(Recipe(name, folder / _SWEEPS / f"{name}.yaml", swept.document, swept.point))
        if base:
            found.insert(0, Recipe(_base_name(documents)))
        if not found:
            raise ConfigurationError("nothing to compare: give --recipes, or leave out --no_base")
        choices = tuple(BudgetChoice.parse(text) for text in budgets)
        _unique([recipe.name for recipe in found], "recipe")
        _unique([choice.label for choice in choices], "budget")
        _unique(seeds, "seed")
        return cls(folder, tuple(configs), tuple(found), choices, tuple(seeds), tuple(extra), _ladders(tune), runs)

    @property
    def cells(self) -> tuple[Cell, ...]:
        """All cells, seed by seed, so that an interrupted comparison is a complete one of fewer seeds."""
        found: dict[Path, Cell] = {}
        for seed in self.seeds:
            for budget in self.budgets or (BudgetChoice(),):
                for recipe in self.recipes:
                    label = OWN if recipe.has_budget else budget.label
                    folder = self.folder / recipe.name / label / str(seed)
                    found.setdefault(folder, Cell(recipe, budget, seed, folder))
        return tuple(found.values())

    def budget_file(self, cell: Cell) -> Path | None:
        """The overlay between base and recipe; None where the base's own budget holds."""
        if not self.budgets and not cell.recipe.has_budget:
            return None
        return self.folder / _BUDGETS / f"{cell.label}.yaml"

    @property
    def tune_file(self) -> Path | None:
        """The overlay over all recipes; None where nothing is tuned and the effort is their own."""
        return self.folder / _TUNE if self._over_all else None

    @property
    def _over_all(self) -> dict[str, Any]:
        """What holds for every recipe, whatever it says: ladders to tune, and full runs to spend."""
        search: dict[str, Any] = (
            {"shared": {name: list(values) for name, values in self.tune.items()}} if self.tune else {}
        )
        if self.runs is not None:
            search["full_runs"] = self.runs
        return {"search": search} if search else {}

    def arguments(self, cell: Cell) -> list[str]:
        """Arguments of `qratk search` for a cell."""
        arguments = [text for path in self.configs for text in ("--config", str(path))] + list(self.extra)
        overlays = [p for p in (self.budget_file(cell), cell.recipe.path, self.tune_file) if p is not None]
        arguments += [text for path in overlays for text in ("--config", str(path))]
        seeds = [key for key in ("seed_everything", "model.seed", "data.seed", "search.seed") if self._has(key)]
        return [*arguments, *(f"--{key}={cell.seed}" for key in seeds), "--run_dir", str(cell.folder)]

    def command(self, cell: Cell) -> str:
        """The search of a cell as one would type it."""
        return shlex.join(["qratk", "search", *self.arguments(cell)])

    def identity(self, cell: Cell) -> dict[str, Any]:
        """What decides a cell's outcome, merged as plain data."""
        budget = BudgetChoice() if cell.recipe.has_budget else cell.budget
        documents = [read_settings(path) for path in self.configs] + [_document(text) for text in self.extra]
        if self.budgets or cell.recipe.has_budget:
            documents.append(budget.document)
        merged: dict[str, Any] = {}
        for document in (*documents, cell.recipe.document, self._over_all):
            merged = laid_over(merged, named_document(document))
        return dict(without_secrets({"seed": cell.seed, "settings": deciding(merged)}))

    def prepare(self) -> None:
        """Write overlays, the plan, and what each cell is; raises `RunDirectoryError` if a cell is another one."""
        identities = [(cell, json.loads(json.dumps(self.identity(cell)))) for cell in self.cells]
        for cell, identity in identities:
            _check(cell, identity)
        for cell, identity in identities:
            cell.folder.mkdir(parents=True, exist_ok=True)
            if not (cell.folder / IDENTITY).exists():
                write_atomically(cell.folder / IDENTITY, json.dumps(identity, indent=1))
            self._write_budget(cell)
            self._write_sweep(cell.recipe)
        if self.tune_file is not None:
            write_atomically(self.tune_file, yaml.safe_dump(self._over_all, sort_keys=False))
        write_atomically(self.folder / COMPARED, to_json(self._compared()))

    def _write_sweep(self, recipe: Recipe) -> None:
        path = recipe.path
        if path is not None and recipe.sweep is not None:
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, yaml.safe_dump(dict(recipe.document), sort_keys=False))

    def _write_budget(self, cell: Cell) -> None:
        path = self.budget_file(cell)
        if path is not None:
            path.parent.mkdir(exist_ok=True)
            choice = BudgetChoice() if cell.recipe.has_budget else cell.budget
            write_atomically(path, yaml.safe_dump(choice.document))

    def _compared(self) -> ComparedDocument:
        """What the report needs to know; that of earlier commands in the same folder is kept."""
        path = self.folder / COMPARED
        before = read_compared(self.folder) if path.exists() else ComparedDocument(base="", recipes={}, budgets=())
        recipes = {
            recipe.name: RecipeEntry(own_budget=recipe.has_budget, sweep=recipe.sweep) for recipe in self.recipes
        }
        budgets = [choice.label for choice in self.budgets]
        if not self.budgets and any(not recipe.has_budget for recipe in self.recipes):
            budgets.append(OWN)
        return ComparedDocument(
            base=next((recipe.name for recipe in self.recipes if recipe.path is None), before.base),
            recipes={**before.recipes, **recipes},
            budgets=tuple(dict.fromkeys([*before.budgets, *budgets])) or (OWN,),
            version=_VERSION,
        )

    def _has(self, key: str) -> bool:
        """Whether a seed can be set: data of third parties need not have one."""
        if key != "data.seed":
            return True
        data: Any = {}
        for path in self.configs:
            data = laid_over({"data": data}, {"data": read_settings(path).get("data", data)})["data"]
        name = data.get("class_path", "") if isinstance(data, Mapping) else data
        return _takes_seed(str(name))


def read_compared(folder: Path) -> ComparedDocument:
    """What was compared in a folder; raises `RunDirectoryError`."""
    path = folder / COMPARED
    if not path.exists():
        raise RunDirectoryError(f"{folder} holds no comparison: {path.name} is missing")
    compared = read_document(ComparedDocument, path)
    if compared.version >= _VERSION:
        return compared
    named = {name: replace(entry, sweep=SweepPoint.of_name(name)) for name, entry in compared.recipes.items()}
    return replace(compared, recipes=named, version=_VERSION)


def _takes_seed(class_path: str) -> bool:
    """Whether a data class has an option `seed`; the project's own have."""
    module, _, name = class_path.rpartition(".")
    if not module or module.startswith("qratk."):
        return True
    import importlib
    import inspect

    try:
        return "seed" in inspect.signature(getattr(importlib.import_module(module), name)).parameters
    except (ImportError, AttributeError, ValueError):
        return True  # the search says what is wrong with it


def _base_name(documents: Sequence[Mapping[str, Any]]) -> str:
    names = [(document.get("search") or {}).get("name") for document in documents]
    return str(next((name for name in reversed(names) if name), "search"))


def _unique(names: Sequence[Any], kind: str) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ConfigurationError(f"two {kind}s are called {twice[0]!r}; give each {kind} once, under a name of its own")


def _ladders(text: str | None) -> dict[str, Sequence[Setting]]:
    """Ladders of "{learning_rate: [1e-3, 3e-3]}"; raises `ConfigurationError` for what no search can vary."""
    given: Any = {} if text is None else load(text)
    if not isinstance(given, Mapping) or not all(isinstance(values, list) for values in given.values()):
        raise ConfigurationError(
            f"--tune is a mapping of settings to their values, as in '{{learning_rate: [1e-3, 3e-3]}}'; got {text!r}"
        )
    ladders = [SharedLadder(str(name), tuple(values)) for name, values in given.items()]
    for ladder in ladders:
        try:
            check_shared(ladder)
        except ConfigurationError as error:
            raise ConfigurationError(f"--tune: {ladder.name}: {error}") from error
    return {ladder.name: ladder.values for ladder in ladders}


def _document(argument: str) -> dict[str, Any]:
    key, _, value = argument.removeprefix("--").partition("=")
    document: Any = load(value)
    for part in reversed(key.split(".")):
        document = {part: document}
    return dict(document)


def _check(cell: Cell, identity: Mapping[str, Any]) -> None:
    path = cell.folder / IDENTITY
    if not path.exists():
        if cell.state != "new":
            raise RunDirectoryError(f"{cell.folder} holds a search that `qratk compare` did not begin; move it away")
        return
    before = read_json(path)
    if not isinstance(before, Mapping):
        raise RunDirectoryError(f"{path} is damaged, or was not written by qratk: it holds no settings")
    stored, given = _comparable(before), _comparable(identity)
    keys = [key for key in sorted({*stored, *given}) if stored.get(key) != given.get(key)]
    if keys:
        lines = [f"  {key}: {stored.get(key, 'not set')} there, {given.get(key, 'not set')} now" for key in keys[:5]]
        raise RunDirectoryError(
            f"{cell.folder} holds a search with other settings:\n"
            + "\n".join(lines)
            + "\nGive those settings again to "
            "go on with it, remove the folder to measure it anew, or give another --run_dir."
        )


def _comparable(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {"seed": identity.get("seed"), **comparable(flatten(identity.get("settings") or {}))}
