"""Plain data of what travels between modules come back equal, and what is wrong with them is said by its place."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import pytest

from qratk.core import Candidate, Configuration, ConfigurationError, Evaluation, Footprint, Request
from qratk.core.plain import flatten, plain, record_data, record_of, request_data, request_of, typed
from qratk.core.result import Record

CONFIGURATION = Configuration.from_text("4:8 2:16*2")
CANDIDATE = Candidate(CONFIGURATION, "sensitivity", ("abc", "def"), 3, "global")
EVALUATION = Evaluation(
    CONFIGURATION, 10, 0.1 + 0.2, Footprint(10, 2, 3, 5, 40, 30), (0.1, 1 / 3), 1.5, checkpoint="c",
    figures={"acc": 1 / 3, "nats": -2.5},
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    name: str
    values: tuple[float, ...] = ()
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Whole:
    configuration: Configuration
    parts: tuple[Part, ...]
    counts: Mapping[int, int | tuple[int, ...]] = field(default_factory=dict)
    figure: float = math.nan
    note: str | None = None


def test_request_comes_back_from_json() -> None:
    request = Request(CANDIDATE, 30)
    assert request_of(json.loads(json.dumps(request_data(request)))) == request


@pytest.mark.parametrize("failed", [False, True])
def test_record_comes_back_from_json(failed: bool) -> None:
    evaluation = Evaluation(CONFIGURATION, 10, -math.inf, EVALUATION.footprint, status="failed", reason="loss is nan")
    record = Record(7, CANDIDATE, evaluation if failed else EVALUATION)
    assert record_of(json.loads(json.dumps(record_data(record)))) == record


def test_record_from_before_figures_has_none() -> None:
    data = record_data(Record(7, CANDIDATE, EVALUATION))
    assert data.pop("figures") == EVALUATION.figures
    assert record_of(data).evaluation == replace(EVALUATION, figures={})


def test_record_of_another_configuration_than_its_digest_is_refused() -> None:
    data = {**record_data(Record(7, CANDIDATE, EVALUATION)), "configuration": "4:8*3"}
    with pytest.raises(ConfigurationError, match="digest"):
        record_of(data)


def test_nested_dataclasses_come_back_from_json() -> None:
    whole = Whole(CONFIGURATION, (Part("x", (0.5, 1.0), "b"), Part("y")), {3: 4, 5: (1, 2)}, 2.0, "n")
    assert typed(Whole, json.loads(json.dumps(plain(whole))), "whole") == whole


def test_figure_that_is_not_finite_is_none_and_comes_back_as_nan() -> None:
    data = plain(Whole(CONFIGURATION, (), figure=-math.inf))
    assert data["figure"] is None
    assert math.isnan(typed(Whole, data, "whole").figure)


def test_numpy_scalars_and_unknown_objects_become_plain() -> None:
    assert plain({"a": np.float64(0.5), 2: (np.int64(3), object)}) == {"a": 0.5, "2": [3, str(object)]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": [{"name": "x", "values": [1, "2"]}]}, r"whole\.parts\[0\]\.values\[1\]: expected a number, got '2'"),
        ({"parts": [{"name": "x", "kind": "c"}]}, r"whole\.parts\[0\]\.kind: expected one of 'a', 'b', got 'c'"),
        ({"parts": [{}]}, r"whole\.parts\[0\]\.name is missing"),
        ({"parts": 3}, r"whole\.parts: expected a list, got 3"),
        ({"counts": {"3": True}}, r"whole\.counts\.3: expected"),
        ({"counts": {"x": 1}}, r"whole\.counts: expected keys of type int, got 'x'"),
        ({"note": 5}, r"whole\.note: expected text, got 5"),
        ({"configuration": "4-8"}, "not of the form"),
    ],
)
def test_what_is_wrong_is_named_by_its_place(change: dict[str, object], message: str) -> None:
    data = {**plain(Whole(CONFIGURATION, ())), **change}
    with pytest.raises(ConfigurationError, match=message):
        typed(Whole, data, "whole")


def test_flatten_joins_keys_with_dots() -> None:
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "a.c": {}, "d": [1]}
