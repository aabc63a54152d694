"""Documents come back as they were written, and damaged or foreign ones end in one message that names the file."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from example_search import example_search

from qratk.core import RunDirectoryError
from qratk.core.plain import plain
from qratk.core.result import SearchResult
from qratk.run.document import FrontDocument, ResultDocument, read_front, read_result, read_settings, to_json


@pytest.fixture(scope="module")
def result() -> SearchResult:
    return example_search()


@pytest.fixture(scope="module")
def text(result: SearchResult) -> str:
    return to_json(ResultDocument.of(result))


def test_result_comes_back_as_it_was_written(tmp_path: Path, text: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(text)
    assert to_json(read_result(path)) == text


def test_result_agrees_with_the_search(tmp_path: Path, result: SearchResult, text: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(text)
    found = read_result(path)
    assert found.best.configuration == result.best.configuration
    assert found.best.score == result.best.score
    assert [c.difference for c in found.comparisons] == [c.difference for c in result.comparisons]
    assert found.problem.steps == result.plan.ladder.steps
    assert found.evaluations_by_rung[result.plan.ladder.highest] == sum(
        r.evaluation.steps == result.plan.ladder.highest for r in result.records
    )
    assert math.isnan(found.top3_hit_rates["low_fidelity"])


def test_best_and_baselines_have_all_figures_and_a_result_from_before_them_has_none(
    tmp_path: Path, result: SearchResult, text: str
) -> None:
    path = tmp_path / "result.json"
    path.write_text(text)
    found = read_result(path)
    assert found.best.figures == result.best.figures
    assert [e.figures for e in found.baselines] == [e.figures for e in result.baselines]
    former = json.loads(text)
    del former["best"]["figures"]
    path.write_text(json.dumps(former))
    assert read_result(path).best.figures == {}


def test_problem_of_a_document_fits_what_the_problem_of_the_search_fits(result: SearchResult) -> None:
    problem = dataclasses.replace(
        result.plan.problem, budget=dataclasses.replace(result.plan.problem.budget, max_average_bits=4.1)
    )
    plan = dataclasses.replace(result.plan, problem=problem)
    document = ResultDocument.of(dataclasses.replace(result, plan=plan))
    fitting = [document.problem.fits(e) for e in result.history]
    assert fitting == [problem.fits(e) for e in result.history]
    assert len(set(fitting)) == 2


def test_front_comes_back_as_it_was_written(tmp_path: Path, result: SearchResult) -> None:
    path = tmp_path / "front.json"
    path.write_text(to_json(FrontDocument.of(result.plan, result.front)))
    assert to_json(read_front(path)) == path.read_text()


def test_result_of_before_formats_is_read(tmp_path: Path, text: str) -> None:
    data = json.loads(text)
    for key in ("format", "top3_hit_rates", "item_weights", "proposals"):
        del data[key]
    del data["problem"]["parameters"]
    (tmp_path / "result.json").write_text(json.dumps(data))
    found = read_result(tmp_path / "result.json")
    assert found.best == read_best(text)
    assert found.top3_hit_rates == {}


def read_best(text: str) -> Any:
    from qratk.core.plain import typed
    from qratk.run.document import EvaluationEntry

    return typed(EvaluationEntry, json.loads(text)["best"], "best")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"best": None}, "result.json.best: expected a mapping, got None"),
        ({"failed_evaluations": "2"}, "result.json.failed_evaluations: expected a whole number, got '2'"),
        ({"format": 99}, "is of format 99.*update qratk"),
        ({"front": {"scope": "disk"}}, "result.json.front.scope: expected one of"),
    ],
)
def test_foreign_result_is_refused_by_its_place(
    tmp_path: Path, text: str, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps({**json.loads(text), **change}))
    with pytest.raises(RunDirectoryError, match=message) as caught:
        read_result(path)
    assert str(path) in str(caught.value)


def test_damaged_result_never_ends_in_another_error(tmp_path: Path, text: str) -> None:
    path, whole, rng = tmp_path / "result.json", text.encode(), np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        at = int(rng.integers(len(whole)))
        path.write_bytes(whole[:at] + rng.bytes(8) + whole[at + 8 :])
        try:
            plain(read_result(path))
        except RunDirectoryError:
            refused += 1
    assert refused > 30


@pytest.mark.parametrize("content", ["{", "[]", "3", "\x00\x01", "[" * 100_000])
def test_file_that_is_no_document_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(content)
    with pytest.raises(RunDirectoryError, match="damaged, or was not written by qratk"):
        read_result(path)


@pytest.mark.parametrize("content", [b"a: [", b"- 1", b"", b"\xff\xfe\xff", b"a: &x [*y]"])
def test_file_that_holds_no_settings_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(RunDirectoryError, match=r"config\.yaml (is damaged|holds no settings)"):
        read_settings(path)


def test_component_of_a_slot_is_told_by_name_and_options(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("search: {searcher: {class_path: nsga2, init_args: {population: 8}}, refiner: none}")
    settings = read_settings(path)
    searcher, refiner = settings.component("searcher"), settings.component("refiner")
    assert searcher is not None
    assert (searcher.name, searcher.options) == ("nsga2", {"population": 8})
    assert refiner is not None
    assert refiner.name == "none"
    assert settings.component("surrogate") is None
