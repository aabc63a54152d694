"""Work tells whoever listens how far it is."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest

from qratk.core.text import duration
from qratk.core.work import Work, counted, listening, working
from qratk.reporters.working import WorkLines, work_text


def test_counted_work_is_told_before_the_first_item_and_after_each() -> None:
    told: list[Work] = []
    with listening(told.append):
        assert list(counted("packing", [5, 6])) == [5, 6]
    assert [(work.what, work.done, work.total) for work in told] == [("packing", n, 2) for n in (0, 1, 2)]
    assert [work.over for work in told] == [False, False, True]


def test_work_of_unknown_length_ends_with_what_was_done() -> None:
    told: list[Work] = []
    with listening(told.append):
        list(counted("reading", iter("abc")))
    assert [(work.done, work.total) for work in told] == [(0, None), (1, None), (2, None), (3, None), (3, 3)]


def test_without_a_listener_nothing_is_told() -> None:
    told: list[Work] = []
    with listening(told.append):
        pass
    list(counted("packing", [1]))
    assert told == []


def test_work_that_fails_is_over_too() -> None:
    told: list[Work] = []
    with pytest.raises(ValueError, match="broken"), listening(told.append), working("loading"):
        raise ValueError("broken")
    assert told[-1].over


def test_an_inner_listener_takes_the_place_of_the_outer_one() -> None:
    outer: list[Work] = []
    inner: list[Work] = []
    with listening(outer.append):
        with listening(inner.append):
            list(counted("inner", [1]))
        list(counted("outer", [1]))
    assert {work.what for work in outer} == {"outer"}
    assert {work.what for work in inner} == {"inner"}


def test_time_left_follows_from_the_rate() -> None:
    assert Work("x", 2, 6, 10.0).seconds_left == 20.0
    assert Work("x", 0, 6, 10.0).seconds_left is None
    assert Work("x", 3, None, 10.0).seconds_left is None
    assert work_text(Work("packing weights", 2, 6, 10.0)) == f"packing weights: 2/6, about {duration(20.0)} left"


@pytest.fixture
def clock() -> tuple[list[float], Callable[[], float]]:
    now = [0.0]
    return now, lambda: now[0]


def test_elsewhere_lines_come_less_and_less_often_and_none_for_short_work(clock) -> None:
    (now, read), out = clock, io.StringIO()
    lines = WorkLines(out, overwriting=False, clock=read)
    for done in range(201):
        now[0] = float(done)
        lines(Work("long", done, 300, now[0]))
    for done in range(3):
        lines(Work("short", done, 2, 0.5))
    assert [line.split(",")[0] for line in out.getvalue().splitlines()] == [
        f"long: {second}/300" for second in (10, 20, 40, 80, 140, 200)
    ]


def test_on_a_terminal_the_line_is_written_over_and_taken_away(clock) -> None:
    (now, read), out = clock, io.StringIO()
    lines = WorkLines(out, overwriting=True, clock=read)
    for done in range(3):
        now[0] += 1.0
        lines(Work("packing", done, 2, now[0]))
    text = out.getvalue()
    assert "\n" not in text
    assert "packing: 1/2, about" in text
    assert text.endswith(" \r"), "the line is gone at the end"
