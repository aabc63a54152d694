"""Recipes that are tuned by the same ladders, and what the report says that took."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from example_comparison import search

from qratk.compare.grid import OWN
from qratk.compare.read import Cells, Outcome, read_cells
from qratk.compare.table import legend, rows, table_markdown, text_row, write_tables

LADDERS: dict[str, Any] = {"learning_rate": [1e-3, 3e-3, 1e-2], "rslora": [False, True]}
RECIPES: dict[str, dict[str, Any]] = {
    "full": {},
    "uniform": {"generations": 0},
    "fixed": {"searcher": {"fixed": {"configurations": ["4:8*5"]}}, "uniform_baselines": False},
    "one": {"generations": 0, "shared": {"learning_rate": [1e-3]}},
}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Cells:
    return compared(tmp_path_factory.mktemp("tuned") / "runs")


@pytest.fixture(scope="module")
def equal(tmp_path_factory) -> Cells:
    return compared(tmp_path_factory.mktemp("equal") / "runs", full_runs=24.0)


def compared(folder: Path, **over: Any) -> Cells:
    for name, settings in RECIPES.items():
        for seed in (0, 1):
            search(folder / name / OWN / str(seed), {"shared": LADDERS, **settings, **over}, seed)
    plan = {"base": "full", "recipes": {name: {"own_budget": False} for name in RECIPES}, "budgets": [OWN]}
    (folder / "compare.json").write_text(json.dumps(plan))
    return read_cells(folder)


def by_name(cells: Cells) -> dict[str, Outcome]:
    return {outcome.recipe: outcome for outcome in cells.outcomes if outcome.seed == 0}


def test_a_recipe_without_a_search_is_tuned_by_as_many_runs_as_each_uniform(tuned):
    cells = by_name(tuned)
    counts = {steps: sum(r.evaluation.steps == steps for r in cells["fixed"].searched) for steps in (10, 30, 90)}
    assert counts == {10: 6, 30: 2, 90: 1}
    fitting = len({r.evaluation.configuration.layers for r in cells["uniform"].searched})
    assert cells["uniform"].high_fidelity == fitting
    assert len(cells["uniform"].searched) == fitting * 9


def test_tuning_is_what_the_same_layers_were_trained_beyond_their_longest_training(tuned):
    fixed, one = by_name(tuned)["fixed"], by_name(tuned)["one"]
    assert fixed.cost == pytest.approx((90 + 30 + 4 * 10) / 90)  # one to the top, one to 30, four to 10 steps
    assert fixed.tuning == pytest.approx((30 + 4 * 10) / 90)
    assert one.tuning == 0.0
    assert (fixed.tunes, one.tunes) == (True, False)


def test_report_says_which_settings_won_and_what_tuning_and_scoring_took(tuned, tmp_path):
    made = {row.recipe: row for row in rows(tuned, "full")}
    fixed = made["fixed"]
    winners = {o.best.configuration.settings["learning_rate"] for o in tuned.of("fixed")}
    assert any(f"learning_rate={winner}" in fixed.settings for winner in winners)
    assert fixed.scorings == 9
    line = text_row(fixed)
    assert (line["tuning"], line["scored"]) == (f"{fixed.tuning:.1f}", "9")
    assert "tuning:" in legend(list(made.values()))
    assert "| settings |" in table_markdown(tuned, list(made.values())).replace("  ", " ")
    write_tables(tuned, list(made.values()), tmp_path)
    with (tmp_path / "table.csv").open() as file:
        table = {row["recipe"]: row for row in csv.DictReader(file)}
    assert float(table["fixed"]["tuning_runs"]) == pytest.approx(fixed.tuning)
    assert table["one"]["settings"] == ""


def test_with_full_runs_given_out_every_recipe_takes_as_many_and_the_table_says_what_for(equal, tmp_path):
    made = {row.recipe: row for row in rows(equal, "full")}
    for name, row in made.items():
        assert row.given_runs == 24
        assert 23 <= row.cost <= 24, name
        line = text_row(row)
        assert line["runs"] == f"{row.cost:.1f} of 24"
        assert line["fresh"] == f"{row.confirming:.1f}"
    # One configuration without a search: all its settings, and the rest of the runs for seeds of the best of them.
    fixed = by_name(equal)["fixed"]
    assert fixed.high_fidelity == 6
    assert fixed.confirming == pytest.approx(24 - 6, abs=1)
    assert fixed.validation == fixed.result.confirmed.mean != fixed.best.score
    fresh = [r.evaluation for r in fixed.records if r.evaluation.replicate]
    assert fixed.scorings == len(fixed.searched) + len(fresh)
    assert len(fixed.items) == 32
    assert sum(fixed.items) / 32 == pytest.approx(fixed.validation)
    assert "fresh:" in legend(list(made.values()))
    write_tables(equal, list(made.values()), tmp_path)
    with (tmp_path / "table.csv").open() as file:
        table = {row["recipe"]: row for row in csv.DictReader(file)}
    assert {float(row["given_runs"]) for row in table.values()} == {24.0}
    assert float(table["fixed"]["fresh_seed_runs"]) == pytest.approx(made["fixed"].confirming)


def test_nothing_is_said_of_settings_where_none_were_tuned(comparison, tmp_path):
    made = rows(comparison, "full")
    write_tables(comparison, made, tmp_path)
    assert "tuning" not in (tmp_path / "table.csv").read_text().splitlines()[0]
    assert "tuning" not in legend(made)
    assert "fresh" not in legend(made)
    assert "given_runs" not in (tmp_path / "table.csv").read_text()
