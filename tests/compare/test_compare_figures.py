"""The figures of a comparison: what they hold, and that each can be drawn."""

from __future__ import annotations

import csv
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from qratk.compare.drawing import NoDataError, View, _apart, is_random, pearson, side_by_side, spearman
from qratk.compare.figures import DRAWINGS, draw_all
from qratk.compare.problem_figures import repair, spread
from qratk.compare.search_figures import (
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
from qratk.reporting.figures import new_figure


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


def test_correlations_are_those_of_scipy():
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 6, 40), rng.integers(0, 6, 40)
    assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert np.isnan(spearman([1, 1, 1], [1, 2, 3]))


def test_labels_are_moved_apart_in_order_and_no_further_than_needed():
    placed = _apart([0.0, 1.0, 1.5, 50.0], 10.0)
    assert placed == pytest.approx([-9.1666667, 0.8333333, 10.8333333, 50.0])
    assert _apart([0.0, 20.0], 10.0) == [0.0, 20.0]


def test_spread_holds_what_takes_nearly_all_of_the_budget(view):
    picture = spread(view)
    limits = {cell.seed: cell.limit for cell in view.own}
    assert {line[0] for line in picture.lines} == set(limits)
    assert all(0.95 * limits[seed] <= size <= limits[seed] for seed, size, _, _ in picture.lines)
    assert len({(line[0], line[3]) for line in picture.lines}) == len(picture.lines)


def test_curve_is_the_best_so_far(view):
    for cell in view.own:
        curve = Curve.of(cell)
        scores = [row.score for row in cell.high]
        assert curve.scores.tolist() == [max(scores[: i + 1]) for i in range(len(scores))]
        assert curve.at(np.array([0.5, 1.0, 1e9]), "numbers").tolist()[1:] == [scores[0], max(scores)]
        assert curve.reached(scores[0]) == 0
        assert curve.reached(max(scores) + 1) is None


def test_efficiency_aligns_seeds_at_the_end_of_the_reference(view):
    lines = [line for line in efficiency(view).lines if line[0] == "full" and line[1].startswith("evaluations")]
    mean = np.mean([cell.validation for cell in view.own])
    assert lines[-1][3] == pytest.approx(mean)
    assert lines[-1][4] == pytest.approx(lines[-1][5])


def test_target_is_what_the_random_recipe_ends_with(view):
    lines = target(view).lines
    ends = {cell.seed: cell.validation for cell in view.random}
    assert ends
    assert all(line[2] == pytest.approx(ends[line[1]]) for line in lines)
    assert all(line[3] == 1 for line in lines if line[0] == "random")


def test_target_may_be_a_quantile(view, comparison):
    lines = target(View(comparison.at("own"), "full", 0.5)).lines
    assert {line[2] for line in lines}.isdisjoint({cell.validation for cell in view.random})


def test_random_recipe_is_known_by_its_strategies(comparison):
    assert {cell.recipe for cell in comparison.outcomes if is_random(cell)} == {"random"}


def test_random_search_of_other_ladders_is_not_the_random_control(comparison):
    random = comparison.at("own").of("random")
    narrow = []
    for cell in random:
        problem = {**cell.result["problem"], "bits": [4]}
        narrow.append(replace(cell, result={**cell.result, "problem": problem}))
    others = tuple(cell for cell in comparison.at("own").outcomes if cell.recipe != "random")
    assert View(replace(comparison.at("own"), outcomes=(*others, *random)), "full").random == random
    assert View(replace(comparison.at("own"), outcomes=(*others, *narrow)), "full").random == ()


def test_ablation_shows_paired_means_and_leaves_sweeps_out(view):
    lines = {line[0]: line for line in ablation(view).lines}
    assert set(lines) == {"full", "random", "plain", "lora-16"}
    against = {cell.seed: cell for cell in view.own}
    base = np.mean([cell.score for cell in view.own])
    assert lines["plain"][3] == pytest.approx(base + difference(view.cells.of("plain"), against).mean)
    assert lines["lora-16"][6] == 1


def test_sweep_takes_in_the_default_of_the_base(view):
    (sweep,) = sweeps(view)
    assert sweep.setting == "generations"
    assert sweep.values == ("1", "3", "4")
    assert sweep.default == "3"
    lines = sweep_curves(view).lines
    assert [(line[1], line[5]) for line in lines] == [("1", 0), ("3", 1), ("4", 0)]
    assert lines[1][2] == 0.0


def test_sensitivity_is_the_range_over_a_sweep(view):
    means = [line[2] for line in sweep_curves(view).lines]
    ((name, width, count),) = sensitivity(view).lines
    assert (name, count) == ("generations", 3)
    assert width == pytest.approx(max(means) - min(means))


def test_repair_needs_counts_by_layer(comparison):
    from dataclasses import replace

    cells = comparison.at("own")
    without = [replace(o, result={**o.result, "proposals": {"proposed": 3}}) for o in cells.outcomes]
    with pytest.raises(NoDataError, match="which layers repair lowered"):
        repair(View(replace(cells, outcomes=tuple(without)), "full"))
    counted = [replace(o, result={**o.result, "proposals": {"repaired_bits": [4, 3, 2, 1, 0]}}) for o in cells.outcomes]
    lines = repair(View(replace(cells, outcomes=tuple(counted)), "full")).lines
    assert [line[4] for line in lines[:5]] == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.0])


def test_equal_values_are_drawn_side_by_side_around_their_mean_and_others_where_they_are():
    shown = side_by_side([4.0, 5.0, 4.0, 4.0])
    assert shown[1] == 5.0
    assert shown[0] < shown[2] < shown[3]
    assert shown[[0, 2, 3]].mean() == pytest.approx(4.0)
    assert np.ptp(side_by_side([4.0, 4.0])) > 0


def test_recipes_at_the_same_point_share_a_label_and_the_reference_leads():
    lines = [("a", 4.0, 9, 1.0), ("full", 4.0, 9, 1.0), ("b", 4.0, 8, 1.0), ("c", 4.0, 9, 0.5)]
    assert [names for names, _ in _merged(lines, "full", 2)] == [("c",), ("full", "a"), ("b",)]


def test_names_of_recipes_over_the_budget_do_not_lie_on_each_other():
    figure, axes = new_figure(6, 4)
    axes.set_ylim(-2.0, -1.0)
    _over_lines(axes, [(-1.70, "a"), (-1.701, "b"), (5.0, "c"), (6.0, "d")], right=True)
    figure.draw_without_rendering()
    boxes = sorted((text.get_window_extent() for text in axes.texts), key=lambda box: box.y0)
    assert [text.get_text()[0] for text in axes.texts] == ["b", "a", "↑", "↑"]
    assert all(below.y1 <= above.y0 + 1 for below, above in pairwise(boxes))
