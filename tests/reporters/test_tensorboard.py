from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import pytest
from example_search import STEPS, example_search, opened, play

from qratk.core.result import SearchResult
from qratk.reporters.tensorboard import TensorBoardReporter


@pytest.fixture(scope="module")
def result() -> SearchResult:
    return example_search(generations=2)


def _read(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory, result: SearchResult) -> Any:
    """Of a search that was interrupted after 14 evaluations and resumed."""
    folder = tmp_path_factory.mktemp("run") / "tensorboard"
    folder.mkdir()
    (folder / "events.out.tfevents.0.other").write_bytes(b"")
    first = opened(TensorBoardReporter(), folder.parent)
    play(first, result, stop_after=14)
    first.close()
    second = opened(TensorBoardReporter(), folder.parent)
    play(second, result, resumed=14)
    second.close()
    assert (folder / "events.out.tfevents.0.other").exists()
    return _read(folder)


def test_scores_of_each_rung_are_those_measured_and_none_is_doubled(events: Any, result: SearchResult) -> None:
    for steps in STEPS:
        expected = [
            (r.index, r.evaluation.score) for r in result.records if r.evaluation.steps == steps and r.evaluation.ok
        ]
        read = [(e.step, e.value) for e in events.Scalars(f"score/at_{steps}_steps")]
        assert read == [(index, pytest.approx(score)) for index, score in expected]


def test_figures_of_each_rung_are_those_of_the_scoring(events: Any, result: SearchResult) -> None:
    for steps in STEPS:
        measured = [r for r in result.records if r.evaluation.steps == steps and r.evaluation.ok]
        for name in ("acc", "log_likelihood"):
            read = [(e.step, e.value) for e in events.Scalars(f"figures_at_{steps}_steps/{name}")]
            assert read == [(r.index, pytest.approx(r.evaluation.figures[name])) for r in measured]


def test_no_step_of_any_scalar_is_doubled(events: Any) -> None:
    for tag in events.Tags()["scalars"]:
        counts = collections.Counter(e.step for e in events.Scalars(tag))
        assert max(counts.values()) == 1, tag


def test_generations_and_refinements_have_their_scalars(events: Any, result: SearchResult) -> None:
    volumes = [e.value for e in events.Scalars("generation/hypervolume")]
    assert volumes == [pytest.approx(g.hypervolume) for g in result.generations]
    improvement = [e.value for e in events.Scalars("refinement/expected_improvement")]
    assert improvement == [pytest.approx(r.diagnostics["expected_improvement"]) for r in result.refinements]
    assert [e.step for e in events.Scalars("surrogate/spearman")] == [1]


def test_figures_that_are_not_finite_are_left_out(events: Any) -> None:
    assert "surrogate/low_fidelity_spearman" not in events.Tags()["scalars"]


def test_best_so_far_never_falls_and_ends_at_the_best(events: Any, result: SearchResult) -> None:
    values = [e.value for e in events.Scalars("best/score")]
    assert values == sorted(values)
    assert values[-1] == pytest.approx(result.best.score)


def test_front_and_allocation_are_images(events: Any) -> None:
    for tag in ("front", "allocation"):
        images = events.Images(tag)
        assert images
        assert min(images[-1].width, images[-1].height) > 300
        assert images[-1].encoded_image_string.startswith(b"\x89PNG")


def test_hyper_parameters_are_recorded(events: Any, result: SearchResult) -> None:
    assert "_hparams_/session_start_info" in events.summary_metadata
    assert events.Scalars("hparam/best_score")[0].value == pytest.approx(result.best.score)
