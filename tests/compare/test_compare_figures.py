"""The figures of a comparison: what they hold, and that each can be drawn."""

from __future__ import annotations

import csv
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from example_comparison import search

from qratk.compare.drawing import NoDataError, View, _apart, is_random, side_by_side
from qratk.compare.figures import DRAWINGS, draw_all
from qratk.compare.problem_figures import repair, spread
from qratk.compare.read import Cells, read_cell
from qratk.compare.search_figures import (
    AblationRow,
    Curve,
    _merged,
    _over_lines,
    ablation,
    efficiency,
    sensitivity,
    sweep_curves,
    sweeps,
    target,
)
from qratk.compare.table import difference
from qratk.reporters.figures import new_figure


@pytest.fixture(scope="module")
def view(comparison):
    return View(comparison.at("own"), "full")


@pytest.fixture(scope="module")
def drawn(comparison, tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    return folder, list(draw_all(comparison, "full", folder))


def test_every_figure_is_a_picture_and_a_table_or_a_line(drawn):
    folder, lines = drawn
    skipped = {line.split()[1] for line in lines if "skipped" in line}
    for name in DRAWINGS:
        exists = (folder / f"{name}.png").exists()
        assert exists == (name not in skipped)
        assert (folder / f"{name}.csv").exists() == exists
        if exists:
            assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
            with (folder / f"{name}.csv").open() as file:
                assert list(csv.DictReader(file))
    assert lines[-1] == f"figures: {len(DRAWINGS) - len(skipped)} in {folder}"


def test_recipe_without_cells_draws_nothing_but_says_so(comparison, tmp_path):
    lines = list(draw_all(comparison, "broken", tmp_path))
    assert "figure 3_allocation skipped: no finished search of broken" in lines
    assert not list(tmp_path.iterdir())


def test_labels_are_moved_apart_in_order_and_no_further_than_needed():
    placed = _apart([0.0, 1.0, 1.5, 50.0], 10.0)
    assert placed == pytest.approx([-9.1666667, 0.8333333, 10.8333333, 50.0])
    assert _apart([0.0, 20.0], 10.0) == [0.0, 20.0]


def test_spread_holds_what_takes_nearly_all_of_the_budget(view):
    picture = spread(view)
    limits = {cell.seed: cell.limit for cell in view.own}
    assert {row.seed for row in picture.rows} == set(limits)
    assert all(0.95 * limits[row.seed] <= row.storage_bytes <= limits[row.seed] for row in picture.rows)
    assert len({(row.seed, row.configuration) for row in picture.rows}) == len(picture.rows)


def test_spread_counts_bytes_as_the_budget_does(tmp_path):
    search(tmp_path / "0", {"scope": "training"}, 0)
    cell = read_cell(tmp_path / "0", "full", "own", 0)
    picture = spread(View(Cells("full", {"full": False}, ("own",), (cell,)), "full"))
    near = {e.configuration for e in cell.high if 0.95 * cell.limit <= e.footprint.training_bytes <= cell.limit}
    assert len(picture.rows) == len(near)


def test_curve_is_the_best_so_far(view):
    for cell in view.own:
        curve = Curve.of(cell)
        scores = [row.score for row in cell.high]
        assert curve.scores.tolist() == [max(scores[: i + 1]) for i in range(len(scores))]
        assert curve.at(np.array([0.5, 1.0, 1e9]), "numbers").tolist()[1:] == [scores[0], max(scores)]
        assert curve.reached(scores[0]) == 0
        assert curve.reached(max(scores) + 1) is None


def test_efficiency_aligns_seeds_at_the_end_of_the_reference(view):
    rows = [row for row in efficiency(view).rows if row.recipe == "full" and row.axis.startswith("evaluations")]
    mean = np.mean([cell.validation for cell in view.own])
    assert rows[-1].mean == pytest.approx(mean)
    assert rows[-1].low == pytest.approx(rows[-1].high)


def test_target_is_what_the_random_recipe_ends_with(view):
    rows = target(view).rows
    ends = {cell.seed: cell.validation for cell in view.random}
    assert ends
    assert all(row.target == pytest.approx(ends[row.seed]) for row in rows)
    assert all(row.reached for row in rows if row.recipe == "random")


def test_target_may_be_a_quantile(view, comparison):
    rows = target(View(comparison.at("own"), "full", 0.5)).rows
    assert {row.target for row in rows}.isdisjoint({cell.validation for cell in view.random})


def test_random_recipe_is_known_by_its_strategies(comparison):
    assert {cell.recipe for cell in comparison.outcomes if is_random(cell)} == {"random"}


def test_random_search_of_other_ladders_is_not_the_random_control(comparison):
    random = comparison.at("own").of("random")
    narrow = []
    for cell in random:
        problem = replace(cell.result.problem, bits=(4,))
        narrow.append(replace(cell, result=replace(cell.result, problem=problem)))
    others = tuple(cell for cell in comparison.at("own").outcomes if cell.recipe != "random")
    assert View(replace(comparison.at("own"), outcomes=(*others, *random)), "full").random == random
    assert View(replace(comparison.at("own"), outcomes=(*others, *narrow)), "full").random == ()


def test_ablation_shows_paired_means_and_leaves_sweeps_out(view):
    rows = {row.recipe: row for row in ablation(view).rows}
    assert set(rows) == {"full", "random", "plain", "lora-16"}
    against = {cell.seed: cell for cell in view.own}
    base = np.mean([cell.score for cell in view.own])
    assert rows["plain"].score == pytest.approx(base + difference(view.cells.of("plain"), against).mean)
    assert rows["lora-16"].over_budget


def test_sweep_takes_in_the_default_of_the_base(view):
    (sweep,) = sweeps(view)
    assert sweep.setting == "generations"
    assert sweep.values == ("1", "3", "4")
    assert sweep.default == "3"
    picture = sweep_curves(view)
    assert [(row.value, row.default) for row in picture.rows] == [("1", False), ("3", True), ("4", False)]
    assert picture.rows[1].difference == 0.0
    assert picture.heads == ("setting", "value", "difference", "low", "high", "default")
    assert [line[5] for line in picture.lines] == [0, 1, 0]


def test_sensitivity_is_the_range_over_a_sweep(view):
    means = [row.difference for row in sweep_curves(view).rows]
    (row,) = sensitivity(view).rows
    assert (row.setting, row.values) == ("generations", 3)
    assert row.range == pytest.approx(max(means) - min(means))


def test_repair_needs_counts_by_layer(comparison):
    cells = comparison.at("own")
    without = [replace(o, result=replace(o.result, proposals={"proposed": 3})) for o in cells.outcomes]
    with pytest.raises(NoDataError, match="which layers repair lowered"):
        repair(View(replace(cells, outcomes=tuple(without)), "full"))
    counts = {"repaired_bits": (4, 3, 2, 1, 0)}
    counted = [replace(o, result=replace(o.result, proposals=counts)) for o in cells.outcomes]
    rows = repair(View(replace(cells, outcomes=tuple(counted)), "full")).rows
    assert [row.share_of_downgrades for row in rows[:5]] == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.0])


def test_equal_values_are_drawn_side_by_side_around_their_mean_and_others_where_they_are():
    shown = side_by_side([4.0, 5.0, 4.0, 4.0])
    assert shown[1] == 5.0
    assert shown[0] < shown[2] < shown[3]
    assert shown[[0, 2, 3]].mean() == pytest.approx(4.0)
    assert np.ptp(side_by_side([4.0, 4.0])) > 0


def test_recipes_at_the_same_point_share_a_label_and_the_reference_leads():
    points = [("a", 9, 1.0), ("full", 9, 1.0), ("b", 8, 1.0), ("c", 9, 0.5)]
    rows = [AblationRow(name, 4.0, size, score, 0.0, 2.0, False) for name, size, score in points]
    assert [names for names, _ in _merged(rows, "full", lambda row: row.bytes)] == [("c",), ("full", "a"), ("b",)]


def test_names_of_recipes_over_the_budget_do_not_lie_on_each_other():
    figure, axes = new_figure(6, 4)
    axes.set_ylim(-2.0, -1.0)
    _over_lines(axes, [(-1.70, "a"), (-1.701, "b"), (5.0, "c"), (6.0, "d")], right=True)
    figure.draw_without_rendering()
    boxes = sorted((text.get_window_extent() for text in axes.texts), key=lambda box: box.y0)
    assert [text.get_text()[0] for text in axes.texts] == ["b", "a", "↑", "↑"]
    assert all(below.y1 <= above.y0 + 1 for below, above in pairwise(boxes))
