"""A small comparison on the toy problem: searches in this process, without torch, read back from their files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from example_search import opened

from qratk.compare.grid import FAILURE, OWN
from qratk.compare.read import Cells, read_cells
from qratk.reporters.files import RunFiles
from qratk.settings.recipe import autoqra
from qratk.testing.toy import ToyEvaluator

BASE: dict[str, Any] = {
    "like": [4, 16], "steps": [10, 30, 90], "generations": 3, "searcher": {"nsga2": {"population": 8, "offspring": 6}},
    "refiner": "none", "high_fidelity_candidates": 2,
}  # fmt: skip
RANDOM: dict[str, Any] = {"searcher": {"random": {"offspring": 6}}, "surrogate": "none"}
RECIPES: dict[str, dict[str, Any]] = {
    "full": {},
    "random": RANDOM,
    "plain": {"surrogate": "none", "mutations": ["uniform"]},
    "lora-16": {"bits": [16], "ranks": [16], "like": [16, 16], "generations": 0},
    "sweep-generations-1": {"generations": 1},
    "sweep-generations-4": {"generations": 4},
}


def search(folder: Path, settings: Mapping[str, Any], seed: int, *, layers: int = 5) -> None:
    """Run one search into a folder, as a cell would."""
    folder.mkdir(parents=True)
    chosen = {**BASE, **settings, "seed": seed}
    (folder / "config.yaml").write_text(yaml.safe_dump({"search": resolved(chosen)}))
    loop = autoqra(evaluator=ToyEvaluator(layers, seed, importance_noise=0.2), **chosen)
    loop.run(run_dir=folder, reporter=opened(RunFiles(), folder), config=chosen)


def resolved(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Components by name with their options, as the command saves them."""
    (name,) = settings["searcher"]
    searcher = {"class_path": name, "init_args": settings["searcher"][name]}
    return {**settings, "searcher": searcher, "refiner": {"class_path": "none"}}


def compare(folder: Path, *, seeds: tuple[int, ...] = (0, 1), recipes: tuple[str, ...] = tuple(RECIPES)) -> Cells:
    """Run a comparison under the base's own budget and read it back; one cell more has failed."""
    for name in recipes:
        for seed in seeds:
            search(folder / name / OWN / str(seed), RECIPES[name], seed)
    facts = {name: {"own_budget": "like" in RECIPES[name]} for name in recipes}
    plan = {"base": "full", "recipes": {**facts, "broken": {"own_budget": False}}, "budgets": [OWN]}
    (folder / "compare.json").write_text(json.dumps(plan))
    broken = folder / "broken" / OWN / "0"
    broken.mkdir(parents=True)
    (broken / FAILURE).write_text(json.dumps({"reason": "out of memory"}))
    return read_cells(folder)
