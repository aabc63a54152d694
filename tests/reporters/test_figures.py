from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from example_search import STEPS, example_problem, example_search, opened, play
from matplotlib.figure import Figure

from qratk.core import Configuration
from qratk.core.result import SearchResult
from qratk.reporters.figures import FrontParts, allocation_figure, front_figure, progress_figure, to_array, to_png
from qratk.reporters.pictures import Pictures


@pytest.fixture(scope="module")
def result() -> SearchResult:
    return example_search()


def _assert_drawn(figure: Figure) -> None:
    pixels = to_array(figure)
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    inked = (pixels < 250).any(axis=2).mean()
    assert 0.01 < inked < 0.9


def _texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_front_names_uniform_baselines_and_units_and_marks_all_points(result: SearchResult) -> None:
    figure = front_figure(result)
    axes = figure.axes[0]
    assert axes.get_xlabel() == "storage bytes (MiB)"
    assert {"2:4", "4:8", "4:16"} <= set(_texts(figure))
    assert any(text.startswith("reference 8:16, at 39.8 MiB") for text in _texts(figure))
    legend = axes.get_legend()
    assert legend is not None
    assert {t.get_text() for t in legend.get_texts()} == {"measured", "front", "uniform", "best", "budget"}
    best = next(c for c in axes.collections if c.get_label() == "best")
    point = np.asarray(best.get_offsets())[0]
    assert point == pytest.approx([result.best.footprint.storage_bytes / 2**20, result.best.score])
    _assert_drawn(figure)


def test_front_enlarges_what_is_crowded_near_the_budget() -> None:
    result = example_search(24, generations=4)
    figure = front_figure(result)
    left, right = figure.axes[1].get_xlim()
    assert left < result.best.footprint.storage_bytes / 2**20 < right
    wide_left, wide_right = figure.axes[0].get_xlim()
    assert right - left < 0.25 * (wide_right - wide_left)
    _assert_drawn(figure)


def test_front_can_be_drawn_before_anything_was_measured(result: SearchResult) -> None:
    budget = result.plan.problem.budget
    empty = FrontParts((), type(result.front)(()), budget)
    assert to_png(front_figure(empty)).startswith(b"\x89PNG")


def test_allocation_bars_are_the_bits_and_ranks_with_their_correlation() -> None:
    bits, ranks = [2, 4, 8, 2], [16, 8, 0, 4]
    figure = allocation_figure(Configuration.of(bits, ranks), [f"model.layers.{i}" for i in range(4)])
    heights = [[bar.get_height() for bar in axes.patches] for axes in figure.axes[:2]]
    assert heights == [bits, ranks]
    assert f"{np.corrcoef(bits, ranks)[0, 1]:+.2f}" in figure.get_suptitle()
    assert [t.get_text() for t in figure.axes[1].get_xticklabels()] == ["0", "1", "2", "3"]
    assert "0" in _texts(figure)  # a layer without an adapter
    _assert_drawn(figure)


def test_allocation_of_a_uniform_configuration_claims_no_correlation() -> None:
    figure = allocation_figure(Configuration.uniform(4, 16, 3), ["a", "b", "c"])
    assert "bits and rank the same everywhere" in figure.get_suptitle()


def test_allocation_of_many_layers_thins_out_the_names() -> None:
    problem = example_problem(224)
    configuration = problem.space.random(np.random.default_rng(0))
    names = [f"model.layers.{i // 7}.part_{i % 7}" for i in range(224)]
    figure = allocation_figure(configuration, names, importance=problem.importance, space=problem.space)
    assert [t.get_text() for t in figure.axes[1].get_xticklabels()] == [str(i) for i in range(32)]
    assert figure.axes[1].get_xticks().tolist() == list(range(0, 224, 7))
    assert len(figure.axes) == 4
    _assert_drawn(figure)


def test_allocation_refuses_names_that_do_not_match() -> None:
    with pytest.raises(ValueError, match="3 layer names are needed, got 2"):
        allocation_figure(Configuration.uniform(4, 16, 3), ["a", "b"])


def test_progress_draws_the_running_maximum_at_the_highest_rung(result: SearchResult) -> None:
    figure = progress_figure(result.records, STEPS[-1], baseline=result.baselines[-1])
    line = next(line for line in figure.axes[0].lines if line.get_label() == "best so far")
    y = np.asarray(line.get_ydata())
    own = [r.evaluation.score for r in result.records
           if r.evaluation.steps == STEPS[-1] and r.candidate.phase != "reference"]  # fmt: skip
    assert y[:-1].tolist() == np.maximum.accumulate(own).tolist()
    assert {"baseline", "global"} <= set(_texts(figure))
    _assert_drawn(figure)


def test_progress_can_be_drawn_of_nothing() -> None:
    assert to_png(progress_figure([], 450)).startswith(b"\x89PNG")


def test_pictures_are_written_to_the_run_directory(tmp_path: Path, result: SearchResult) -> None:
    pictures = opened(Pictures(), tmp_path)
    pictures.started(result.plan)
    pictures.finished(result)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"front.png", "allocation.png", "progress.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())


def test_pictures_of_an_interrupted_search_show_its_last_generation(tmp_path: Path) -> None:
    play(opened(Pictures(), tmp_path), example_search(generations=1), stop_after=18)
    assert (tmp_path / "front.png").exists()


def test_figures_leave_no_global_state_behind(result: SearchResult) -> None:
    for _ in range(3):
        front_figure(result)
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []
