"""How requests are cut into groups: by the rung they continue from, evenly, and no larger than anything allows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from qratk.core import Candidate, Configuration, Request
from qratk.training.grouping import CohortLimits, Grouping


def requests(number: int, *, steps: int = 2) -> list[Request]:
    return [Request(Candidate(Configuration.uniform(2, 2, 1 + index), "test"), steps) for index in range(number)]


def grouping(wanted: Any = "auto", limits: CohortLimits | None = None, **changes: Any) -> Grouping:
    parts: dict[str, Any] = {
        "begins_at": lambda configuration, steps: 0,
        "fastest": lambda configurations: 4,
        "decided": lambda key, decide: decide(),
        "recorded": lambda key: None,
        "say": lambda text: None,
        **changes,
    }
    return Grouping(wanted, limits or CohortLimits(), **parts)


def sizes(of: Grouping, asked: Sequence[Request]) -> list[int]:
    return [len(group) for group in of.groups(asked)]


@pytest.mark.parametrize("number", range(1, 40))
def test_the_groups_of_the_rest_are_those_of_the_whole(number: int) -> None:
    asked = requests(number)
    for size in (1, 2, 5, 8, 25):
        groups = [list(group) for group in grouping(size).groups(asked)]
        assert [request for group in groups for request in group] == asked
        assert max(map(len, groups)) <= size
        assert max(map(len, groups)) - min(map(len, groups)) <= 1
        for first in range(1, len(groups)):
            rest = [request for group in groups[first:] for request in group]
            assert [list(group) for group in grouping(size).groups(rest)] == groups[first:]


def test_requests_that_continue_from_different_rungs_are_apart() -> None:
    apart = grouping(8, begins_at=lambda configuration, steps: 2 if len(configuration) < 3 else 0)
    assert sizes(apart, requests(5, steps=4)) == [2, 3]
    assert sizes(apart, requests(2, steps=2) + requests(2, steps=4)) == [2, 2]


def test_the_fastest_size_is_measured_once() -> None:
    asked: list[int] = []
    auto = grouping(fastest=lambda configurations: asked.append(len(configurations)) or 3)
    assert sizes(auto, requests(7)) == [3, 2, 2]
    assert sizes(auto, requests(3)) == [3]
    assert asked == [7]


def test_what_did_not_fit_is_not_tried_again_and_the_cure_is_said() -> None:
    said: list[str] = []
    cut = grouping(8, say=said.append)
    assert sizes(cut, requests(8)) == [8]
    assert cut.halved(8) == 4
    assert sizes(cut, requests(8)) == [4, 4]
    assert "cohort=4" in said[0]


def test_what_did_not_fit_in_another_process_is_known_from_what_it_recorded() -> None:
    assert sizes(grouping(8, recorded={"cohort/6": 3}.get), requests(8)) == [3, 3, 2]
    assert sizes(grouping(5, recorded={"cohort/6": 3}.get), requests(8)) == [4, 4]


@pytest.mark.parametrize(
    ("limits", "ranks", "expected"),
    [
        (CohortLimits(), (0, 2), [2]),
        (CohortLimits(dropout=True), (2, 4), [2]),
        (CohortLimits(dropout=True), (0, 2), [1, 1]),
        (CohortLimits(scaled_gradients=True), (2, 4), [1, 1]),
    ],
)
def test_what_candidates_would_share_keeps_them_apart(
    limits: CohortLimits, ranks: tuple[int, int], expected: list[int]
) -> None:
    asked = [Request(Candidate(Configuration.uniform(4, rank, 3), "test"), 2) for rank in ranks]
    assert sizes(grouping(2, limits), asked) == expected


def test_a_method_that_is_trained_alone_is_explained_once_unless_that_was_asked_for() -> None:
    said: list[str] = []
    alone = grouping("auto", CohortLimits(refusal="it cannot"), say=said.append)
    assert sizes(alone, requests(2)) == [1, 1]
    assert said == ["Candidates are trained one by one: it cannot."]
    quiet = grouping(1, CohortLimits(refusal="it cannot"), say=said.append)
    assert sizes(quiet, requests(2)) == [1, 1]
    assert len(said) == 1
