"""The paper's tables of a comparison: scores with what they take, figures by task, intervals over seeds."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from documents import evaluation_entry, result_document
from scipy.stats import ttest_1samp, ttest_rel

from qratk.cli.compare import print_paper_table
from qratk.compare.grid import OWN
from qratk.compare.paper import PaperTable, as_csv, as_markdown, paper_tables, write_paper_tables
from qratk.compare.read import Cells, Outcome
from qratk.compare.table import cells_csv, rows
from qratk.run.document import Settings

TASKS: dict[str, Any] = {"qa": {"data": {}, "metric": None}, "arc": {"metric": "acc_norm"}}
RUNS = {
    "base": [(0.30, 0.50), (0.34, 0.54), (0.29, 0.58)],
    "a": [(0.40, 0.50), (0.42, 0.55), (0.41, 0.57)],
    "b": [(0.10, 0.45), (0.20, 0.55)],
}
"""Figures of the tasks arc and qa by recipe and seed."""


def outcome(recipe: str, seed: int, test: Mapping[str, float], *, size: int = 100, tasks: Any = None) -> Outcome:
    best = evaluation_entry("4:8*2", 0.1, size)
    result = result_document(best, limit=100, test_scores={"4:8*2": dict(test)})
    return Outcome(recipe, OWN, seed, result, settings=Settings({"data": {"init_args": {"test": tasks}}}))


def of_suite(arc: float, qa: float) -> dict[str, float]:
    return {"score": (arc + qa) / 2, "qa/score": qa, "arc/score": arc, "arc/acc_norm": arc, "arc/acc": 0.9}


def tables_of(*outcomes: Outcome) -> list[PaperTable]:
    names = dict.fromkeys(o.recipe for o in outcomes)
    cells = Cells("base", dict.fromkeys(names, False), (OWN,), outcomes)
    return paper_tables(cells, rows(cells, "base"))


@pytest.fixture(scope="module")
def suite() -> list[PaperTable]:
    cells = [
        outcome(recipe, seed, of_suite(*figures), size=200 if recipe == "b" else 100, tasks=TASKS)
        for recipe, runs in RUNS.items() for seed, figures in enumerate(runs)
    ]  # fmt: skip
    return tables_of(*cells)


def read(tables: list[PaperTable]) -> dict[tuple[str, str], dict[str, str]]:
    return {(line["recipe"], line["figure"]): line for line in csv.DictReader(io.StringIO(as_csv(tables)))}


def test_of_a_suite_there_are_the_average_and_each_task_with_its_metric(suite: list[PaperTable]) -> None:
    assert [column.head for column in suite[0].columns] == ["average", "arc (acc_norm)", "qa"]


def test_intervals_are_those_of_student_over_seeds_and_differences_are_paired(suite: list[PaperTable]) -> None:
    found = read(suite)["a", "arc"]
    ours, theirs = ([arc for arc, _ in RUNS[name]] for name in ("a", "base"))
    alone, paired = (test.confidence_interval() for test in (ttest_1samp(ours, 0.0), ttest_rel(ours, theirs)))
    assert [float(found[name]) for name in ("mean", "low", "high")] == pytest.approx([0.41, alone.low, alone.high])
    told = [float(found[name]) for name in ("difference", "difference_low", "difference_high")]
    assert told == pytest.approx([0.1, paired.low, paired.high])
    assert (found["metric"], found["seeds"], found["paired_seeds"]) == ("acc_norm", "3", "3")


def test_a_recipe_with_fewer_seeds_is_paired_over_those_that_it_has(suite: list[PaperTable]) -> None:
    found = read(suite)["b", "qa"]
    assert (found["seeds"], found["paired_seeds"], found["over_budget"]) == ("2", "2", "1")
    assert float(found["difference"]) == pytest.approx((0.45 + 0.55 - 0.50 - 0.54) / 2)


def test_the_reference_has_no_difference_to_itself(suite: list[PaperTable]) -> None:
    assert read(suite)["base", "average"]["difference"] == ""


def test_markdown_tells_percent_with_intervals_and_marks_best_and_next(suite: list[PaperTable]) -> None:
    text = as_markdown(suite)
    assert (
        "| Method | n | Average↑ | AvgBit↓ | AvgRank | Mem, stored↓ | Mem, training peak↓ | difference [95 %] |" in text
    )
    assert "| Method | Bit | Rank | Mem | average | arc (acc_norm) | qa |" in text
    lines = {line.split(" | ")[0].strip("| "): line for line in text.split("## ")[2].splitlines() if line[:1] == "|"}
    assert "| **41.00 ± 2.48** |" in lines["a"]
    assert "| <u>31.00 ± 6.57</u> |" in lines["base"]
    assert "b †" in lines
    assert "## Differences to base by task" in text


def test_of_one_seed_there_is_no_interval() -> None:
    text = as_markdown(
        tables_of(*(outcome(name, 0, of_suite(0.25, figure)) for name, figure in [("base", 0.5), ("a", 0.75)]))
    )
    assert "| **50.00** |" in text
    assert "±" not in text.split("On test data")[0]
    assert "| a | +12.50 | +0.00 | +25.00 |" in text


def test_other_data_have_a_column_for_each_metric_as_it_is() -> None:
    cells = [outcome("base", 0, {"score": 0.3, "acc": 0.9}), outcome("a", 0, {"score": 0.5, "acc": 0.7})]
    (table,) = tables_of(*cells)
    text = as_markdown([table])
    assert not table.suite
    assert "| a | 4.00 | 8.00 | 100 B | **0.5000** | <u>0.7000</u> |" in text
    assert "| base | 4.00 | 8.00 | 100 B | <u>0.3000</u> | **0.9000** |" in text


def test_without_test_data_the_score_is_that_of_validation() -> None:
    best = evaluation_entry("4:8*2", 0.25, 100)
    (table,) = tables_of(Outcome("base", OWN, 0, result_document(best, limit=100)))
    assert (table.rows[0].figures[0].seeds, table.rows[0].figures[0].mean) == (1, 0.25)


def test_printed_tables_hold_every_method_and_task(suite: list[PaperTable], capsys: pytest.CaptureFixture[str]) -> None:
    print_paper_table(suite[0])
    text = capsys.readouterr().out
    assert all(
        word in text for word in ("base", "b †", "arc (acc_norm)", "Table 1", "Table 2", "41.00 ± 2.48", "percent")
    )


def test_files_are_written(suite: list[PaperTable], tmp_path: Path) -> None:
    assert [path.name for path in write_paper_tables(suite, tmp_path)] == ["tables.md", "tables.csv"]
    assert (tmp_path / "tables.md").read_text() == as_markdown(suite)


def test_every_figure_of_a_test_is_in_the_table_of_cells(suite: list[PaperTable]) -> None:
    test = of_suite(0.1, 0.2)
    cells = Cells("base", {"base": False}, (OWN,), (outcome("base", 0, test),))
    columns = cells_csv(cells).splitlines()[0].split(",")
    assert {f"test_{name}" for name in test} <= set(columns)
