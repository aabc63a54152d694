"""What is read back of a comparison, and the tables made of it."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from documents import evaluation_entry, result_document
from example_comparison import compare

from qratk.cli.compare import print_table, report
from qratk.compare.grid import OWN
from qratk.compare.read import Cells, Outcome, read_cells
from qratk.compare.table import (
    cells_csv,
    difference,
    known_columns,
    reference_name,
    rows,
    table_markdown,
    text_row,
    write_tables,
)
from qratk.core.errors import ConfigurationError, RunDirectoryError


def outcome(recipe, seed, score, *, test=None, items=(), weights=None, size=100, limit=100, budget=OWN) -> Outcome:
    best = evaluation_entry("4:8*2", score, size)
    tests = {} if test is None else {"4:8*2": test}
    result = result_document(best, limit=limit, test_scores=tests, item_weights=weights)
    return Outcome(recipe, budget, seed, result, items=tuple(items))


def made_of(*outcomes, own=()) -> Cells:
    names = dict.fromkeys(o.recipe for o in outcomes)
    return Cells("base", {name: name in own for name in names}, (OWN,), outcomes)


def test_files_are_read_back(comparison):
    assert comparison.names == ("full", "random", "plain", "lora-16", "sweep-generations-1", "sweep-generations-4")
    assert [(f.recipe, f.reason) for f in comparison.failed] == [("broken", "out of memory")]
    for cell in comparison.outcomes:
        assert cell.validation == cell.result.best.score
        assert cell.score == cell.test["score"]
        assert np.mean(cell.items) == pytest.approx(cell.validation)
        assert max(row.score for row in cell.high) == cell.validation


def test_configuration_of_the_best_is_expanded(comparison):
    for cell in comparison.outcomes:
        best = cell.best.configuration
        assert len(best) == 5
        assert next(e for e in cell.high if e.configuration == best).score == cell.validation


def test_continued_training_costs_once(comparison):
    for cell in comparison.outcomes:
        longest: dict = {}
        for e in (record.evaluation for record in cell.searched):
            longest[e.configuration] = max(e.steps, longest.get(e.configuration, 0))
        assert cell.cost == pytest.approx(sum(longest.values()) / 90)
        assert (np.diff(cell.costs) >= 0).all()


def test_a_training_that_several_share_costs_once(comparison):
    cell = comparison.of("full")[0]
    records = [replace(r, evaluation=replace(r.evaluation, trained_as="one")) for r in cell.records]
    shared = replace(cell, records=tuple(records))
    assert shared.cost == pytest.approx(1.0)
    assert cell.cost > 1


def test_frozen_rung_costs_nothing(comparison):
    cell = comparison.of("full")[0]
    problem = replace(cell.result.problem, proxy="minus the divergence of the frozen model")
    frozen = replace(cell, result=replace(cell.result, problem=problem))
    higher: dict = {}
    for e in (record.evaluation for record in cell.searched):
        if e.steps > 10:
            higher[e.configuration] = max(e.steps, higher.get(e.configuration, 0))
    assert frozen.cost == pytest.approx(sum(higher.values()) / 90)
    common = replace(cell, result=replace(cell.result, problem=replace(problem, shared_runs=1)))
    assert common.cost == pytest.approx(frozen.cost + 1)
    assert common.confirming == frozen.confirming


def test_differences_are_paired_by_seed():
    ours = [
        outcome("a", seed, 0.0, test={"score": score}) for seed, score in ((0, 1.5), (1, 2.00005), (2, 3.0), (7, 99.0))
    ]
    theirs = {seed: outcome("base", seed, 0.0, test={"score": s}) for seed, s in ((0, 1.0), (1, 2.0), (2, 4.0))}
    found = difference(ours, theirs)
    assert found.seeds == 3
    assert found.mean == pytest.approx((0.5 + 0.00005 - 1.0) / 3)
    assert (found.wins, found.ties, found.losses) == (1, 1, 1)
    assert -1.0 <= found.low < found.mean < found.high <= 0.5


def test_interval_over_items_needs_items_that_make_up_the_score():
    rng = np.random.default_rng(0)
    pairs = []
    for seed in range(3):
        a, b = rng.normal(1, 1, 50), rng.normal(0, 1, 50)
        pairs.append((outcome("a", seed, a.mean(), items=a), outcome("base", seed, b.mean(), items=b)))
    against = {theirs.seed: theirs for _, theirs in pairs}
    found = difference([ours for ours, _ in pairs], against)
    assert found.validation_low < found.validation < found.validation_high
    wrong = [replace(ours, items=tuple(np.array(ours.items) + 1)) for ours, _ in pairs]
    assert math.isnan(difference(wrong, against).validation_low)


def test_weighted_items_are_weighed():
    items, weights = (0.0, 1.0), (1.0, 3.0)
    ours = outcome("a", 0, 0.75, items=items, weights=weights)
    theirs = outcome("base", 0, 0.0, items=(0.0, 0.0), weights=weights)
    assert not math.isnan(difference([ours], {0: theirs}).validation_low)


def test_best_is_what_scores_highest_within_the_budget():
    cells = [
        outcome("base", 0, 0.5), outcome("big", 0, 0.9, size=200, limit=200), outcome("small", 0, 0.6, size=50),
    ]  # fmt: skip
    found = {row.recipe: row for row in rows(made_of(*cells), "base")}
    assert [name for name, row in found.items() if row.over] == ["big"]
    assert [name for name, row in found.items() if row.best] == ["small"]
    assert list(found) == ["big", "small", "base"]


def test_best_is_told_among_recipes_with_all_seeds():
    cells = [outcome("base", 0, 0.5), outcome("base", 1, 0.7), outcome("a", 1, 0.7)]
    assert [row.recipe for row in rows(made_of(*cells), "base") if row.best] == ["base"]


def test_recipe_with_its_own_budget_stands_in_every_budget():
    cells = [
        outcome("base", 0, 0.5, budget="1KiB"), outcome("base", 0, 0.6, budget="2KiB"), outcome("lora", 0, 0.9),
    ]  # fmt: skip
    comparison = Cells("base", {"base": False, "lora": True}, ("1KiB", "2KiB"), tuple(cells))
    found = [(row.budget, row.recipe, row.score) for row in rows(comparison, "base")]
    assert found == [("1KiB", "lora", 0.9), ("1KiB", "base", 0.5), ("2KiB", "lora", 0.9), ("2KiB", "base", 0.6)]


def test_failed_recipes_come_last_with_their_reason(comparison):
    found = rows(comparison, "full")
    assert found[-1].recipe == "broken"
    assert found[-1].reason == "out of memory"
    text = table_markdown(comparison, found)
    assert "- broken (own/0): out of memory" in text


def test_reference_is_the_base_unless_another_is_given(comparison):
    assert reference_name(comparison) == "full"
    assert reference_name(comparison, "random") == "random"
    with pytest.raises(ConfigurationError, match="no recipe is called 'rand'"):
        reference_name(comparison, "rand")


def test_tables_are_written_for_machines_and_people(comparison, tmp_path):
    found = rows(comparison, "full")
    written = write_tables(comparison, found, tmp_path)
    assert {path.name for path in written} == {path.name for path in tmp_path.iterdir()}
    with (tmp_path / "table.csv").open() as file:
        table = {row["recipe"]: row for row in csv.DictReader(file)}
    cells = list(csv.DictReader(io.StringIO(cells_csv(comparison))))
    assert len(cells) == len(comparison.outcomes) + 1
    for name in comparison.names:
        scores = [float(cell["test_score"]) for cell in cells if cell["recipe"] == name]
        assert float(table[name]["score"]) == pytest.approx(np.mean(scores))
        assert float(table[name]["score_sd"]) == pytest.approx(np.std(scores, ddof=1))
    base = {cell["seed"]: float(cell["test_score"]) for cell in cells if cell["recipe"] == "full"}
    gaps = [float(c["test_score"]) - base[c["seed"]] for c in cells if c["recipe"] == "random"]
    assert float(table["random"]["difference"]) == pytest.approx(np.mean(gaps))
    assert table["full"]["difference"] == ""
    assert table["lora-16"]["over_budget"] == "1"


def test_validation_score_stands_in_where_nothing_was_tested():
    assert outcome("a", 0, 0.25).score == 0.25


def test_printed_table_names_every_recipe(comparison, capsys):
    print_table(rows(comparison, "full"))
    text = capsys.readouterr().out
    assert all(name in text for name in comparison.recipes)
    assert "full (reference)" in text


def test_report_needs_a_comparison(tmp_path):
    with pytest.raises(RunDirectoryError, match="holds no comparison"):
        report(tmp_path)


def test_report_says_by_its_status_whether_all_are_finished(tmp_path, capsys):
    compare(tmp_path / "runs", seeds=(0,), recipes=("full",))
    assert report(tmp_path / "runs", figures=False) == 1
    (tmp_path / "runs" / "broken" / OWN / "0" / "failure.json").unlink()
    (tmp_path / "runs" / "broken" / OWN / "0").rmdir()
    assert report(tmp_path / "runs", figures=False) == 0
    capsys.readouterr()


def test_cells_that_were_not_begun_are_no_failures(tmp_path, capsys):
    compare(tmp_path / "runs", seeds=(0,), recipes=("full",))
    (tmp_path / "runs" / "broken" / OWN / "0" / "failure.json").unlink()
    comparison = read_cells(tmp_path / "runs")
    assert [cell.reason for cell in comparison.failed] == ["not begun"]
    assert report(tmp_path / "runs", figures=False) == 0
    assert "no result: broken (own/0): not begun" in capsys.readouterr().out


def test_budget_is_that_of_the_seed():
    cells = [outcome("base", 0, 0.5, limit=100), outcome("base", 1, 0.5, limit=50)]
    cells += [outcome("a", 0, 0.9, size=80), outcome("b", 1, 0.9, size=80)]
    found = {row.recipe: row.over for row in rows(made_of(*cells), "base")}
    assert found == {"base": True, "a": False, "b": True}


def test_narrow_table_keeps_what_matters(comparison):
    lines = [text_row(row) for row in rows(comparison, "full")]
    assert known_columns(lines, narrow=True) == [
        "recipe",
        "n",
        "test score",
        "bytes",
        "bits",
        "HF",
        "difference [95 %]",
        "w/t/l",
    ]
    assert "acc" not in known_columns(lines)


def test_unreadable_result_names_its_folder(tmp_path):
    compare(tmp_path / "runs", seeds=(0,), recipes=("full",))
    folder = tmp_path / "runs" / "full" / OWN / "0"
    (folder / "result.json").write_text("{")
    with pytest.raises(RunDirectoryError, match=r"result\.json is damaged"):
        read_cells(tmp_path / "runs")


@pytest.mark.parametrize("content", ["{", "[]", '{"base": "full", "recipes": {"full": 3}, "budgets": ["own"]}'])
def test_damaged_list_of_what_was_compared_is_one_message(tmp_path, content):
    (tmp_path / "compare.json").write_text(content)
    with pytest.raises(RunDirectoryError, match=r"compare\.json is damaged"):
        read_cells(tmp_path)


def test_damaged_reason_of_a_failed_cell_is_one_message(tmp_path):
    recipes = {"full": {"own_budget": False}}
    (tmp_path / "compare.json").write_text(json.dumps({"base": "full", "recipes": recipes, "budgets": [OWN]}))
    folder = tmp_path / "full" / OWN / "0"
    folder.mkdir(parents=True)
    (folder / "failure.json").write_text("{}")
    with pytest.raises(RunDirectoryError, match=r"failure\.json\.reason is missing"):
        read_cells(tmp_path)
