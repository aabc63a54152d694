"""Radii and centres against tables worked out by hand (Eq. 18, 19)."""

from __future__ import annotations

import pytest

from qratk.core import Configuration, ConfigurationError, SearchSpace
from qratk.refiners._regions import RadiusRule, Region, spread

A, B = Configuration.of([4, 4], [4, 4]), Configuration.of([8, 4], [4, 4])


@pytest.mark.parametrize(
    ("radius", "grown", "shrunk"), [(1, 2, 1), (2, 4, 1), (3, 6, 1), (4, 8, 2), (5, 8, 2), (7, 8, 3), (8, 8, 4)]
)
def test_radius_doubles_and_halves_within_its_bounds(radius: int, grown: int, shrunk: int) -> None:
    rule = RadiusRule()
    assert rule.grown(radius) == grown
    assert rule.shrunk(radius) == shrunk


def test_factors_that_give_no_whole_radius_still_move_it() -> None:
    rule = RadiusRule(start=2, lowest=1, highest=9, expand=1.3, shrink=0.9)
    assert [rule.grown(r) for r in (1, 2, 3, 9)] == [2, 3, 4, 9]
    assert [rule.shrunk(r) for r in (1, 2, 3, 9)] == [1, 1, 2, 8]


def test_success_moves_the_centre_and_grows_the_radius() -> None:
    assert Region(A, 2, 1).after(B, improved=True, rule=RadiusRule()) == Region(B, 4, 2)


def test_failure_keeps_the_centre_and_shrinks_the_radius() -> None:
    assert Region(A, 4, 1).after(B, improved=False, rule=RadiusRule()) == Region(A, 2, 2)


def test_centres_are_taken_in_order_at_the_wanted_distance() -> None:
    space = SearchSpace((2, 4, 8), (4, 8, 16), ("a",))
    line = [
        Configuration.of([2], [4]),
        Configuration.of([4], [4]),
        Configuration.of([8], [4]),
        Configuration.of([8], [16]),
    ]
    assert spread(line, space, count=3, distance=2) == (line[0], line[2], line[3])
    assert spread(line, space, count=2, distance=1) == (line[0], line[1])
    assert spread(line, space, count=3, distance=2, taken=line[:1]) == (line[2], line[3])


@pytest.mark.parametrize(
    "options", [{"lowest": 0}, {"start": 9}, {"lowest": 3}, {"expand": 0.5}, {"shrink": 0.0}, {"shrink": 2.0}]
)
def test_radius_rules_that_make_no_sense_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError):
        RadiusRule(**options)
