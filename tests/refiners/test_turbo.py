"""One trust region with counters: radius, restarts, and the optimum of small spaces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from refiner_toys import LADDER, Bench, feasible_starts, smooth_score, toy_problem, toy_proposer

from qratk.core import Configuration, ConfigurationError
from qratk.refiners.base import refiners
from qratk.refiners.turbo import Turbo
from qratk.testing import RefinerContract

HIGH = LADDER.highest


class TestTurboContract(RefinerContract):
    steps = 2

    @pytest.fixture
    def make(self) -> Callable[[], Turbo]:
        return lambda: refiners.create("turbo", pool_size=60, max_evaluations=4, failure_tolerance=1, radius=1)


@pytest.fixture
def by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process: of the pool the member with the fewest bytes is chosen, which takes no time."""
    monkeypatch.setattr(Turbo, "_scores", lambda self, points, utilities, members, **_: np.zeros(len(members)))


def begun(bench: Bench, starts: list[Configuration], **options: Any) -> Turbo:
    refiner = refiners.create("turbo", **{"pool_size": 60, **options})
    refiner.begin(toy_proposer(bench.problem), bench.ladder, bench.start(starts), bench.history)
    return refiner


def radii(scores: list[float], **options: Any) -> list[int]:
    """Radius after each measurement when these come out as given, from a start of score 1."""
    problem = toy_problem(6, 1.0)
    starts = feasible_starts(problem, 3, 0)
    bench = Bench(problem, dict(zip(starts, [0.0, -1.0, 1.0], strict=True)).__getitem__)
    refiner = begun(bench, starts, **{"restart_distance": 100, **options})
    outcomes = iter(scores)
    bench.score = lambda c: next(outcomes)
    rng, seen = np.random.default_rng(0), []
    for _ in scores:
        bench.step(refiner, rng)
        seen.append(refiner.state()["radius"])
    return seen


@pytest.mark.usefixtures("by_bytes")
def test_radius_doubles_after_successes_in_a_row() -> None:
    assert radii([2, 3, 4, 5, 6, 7], success_tolerance=3, radius=2, max_evaluations=9) == [2, 2, 4, 4, 4, 8]


@pytest.mark.usefixtures("by_bytes")
def test_radius_halves_after_failures_in_a_row_and_a_success_resets_the_count() -> None:
    outcomes = [0, 0, 2, 0, 0, 0]
    assert radii(outcomes, failure_tolerance=3, radius=4, max_evaluations=9) == [4, 4, 4, 4, 4, 2]


@pytest.mark.usefixtures("by_bytes")
def test_a_tie_is_a_failure() -> None:
    assert radii([1, 1], failure_tolerance=2, radius=4, max_evaluations=9) == [4, 2]


@pytest.mark.usefixtures("by_bytes")
def test_collapse_starts_again_at_the_best_that_is_far_from_all_centres() -> None:
    problem = toy_problem(4, 1.0)
    texts = ["8:16*4", "8:16*3 4:16", "2:4*4", "4:8*4"]
    starts = [Configuration.from_text(text) for text in texts]
    bench = Bench(problem, dict(zip(starts, [4.0, 3.0, 2.0, 1.0], strict=True)).__getitem__)
    refiner = begun(bench, starts, radius=1, failure_tolerance=2, restart_distance=4)
    bench.score = lambda c: -1.0
    rng = np.random.default_rng(0)
    asked = [bench.step(refiner, rng)[0] for _ in range(3)]
    assert [request.candidate.parents[0] for request in asked] == [starts[0].digest] * 2 + [starts[2].digest]
    assert problem.space.atomic_distance(asked[2].configuration, starts[2]) == 1
    assert refiner.diagnostics["restarts"] == 1.0


@pytest.mark.usefixtures("by_bytes")
def test_success_after_a_restart_is_measured_by_the_new_region() -> None:
    problem = toy_problem(4, 1.0)
    starts = [Configuration.from_text(text) for text in ("8:16*4", "2:4*4")]
    bench = Bench(problem, dict(zip(starts, [4.0, 1.0], strict=True)).__getitem__)
    refiner = begun(bench, starts, radius=1, failure_tolerance=1)
    outcomes = iter([0.0, 2.0, 0.0])
    bench.score = lambda c: next(outcomes)
    rng = np.random.default_rng(0)
    first, second, third = (bench.step(refiner, rng)[0] for _ in range(3))
    assert first.candidate.parents == (starts[0].digest,)
    assert second.candidate.parents == (starts[1].digest,)
    assert third.candidate.parents == (second.configuration.digest,)  # 2 is under the 4 of the first region


@pytest.mark.usefixtures("by_bytes")
def test_without_a_measured_place_to_start_at_a_random_one_is_measured() -> None:
    problem = toy_problem(4, 1.0)
    start = Configuration.from_text("8:16*4")
    bench = Bench(problem, lambda c: 1.0)
    refiner = begun(bench, [start], radius=1, failure_tolerance=1)
    bench.score = lambda c: 0.0
    rng = np.random.default_rng(0)
    bench.step(refiner, rng)
    [drawn] = bench.step(refiner, rng)
    [after] = bench.step(refiner, rng)
    assert drawn.candidate.parents == ()
    assert problem.space.atomic_distance(drawn.configuration, start) > 4
    assert after.candidate.parents == (drawn.configuration.digest,)


def test_candidates_lie_within_the_radius_of_the_centre() -> None:
    problem = toy_problem(4, 1.0)  # nothing to repair: the radius itself shows
    bench = Bench(problem, smooth_score(problem))
    refiner = begun(bench, feasible_starts(problem, 4, 0), radius=2, max_evaluations=4)
    rng = np.random.default_rng(0)
    while not refiner.finished:
        for request in bench.step(refiner, rng):
            centre = next(
                e.configuration for e in bench.history if e.configuration.digest == request.candidate.parents[0]
            )
            distance = problem.space.atomic_distance(request.configuration, centre)
            assert 1 <= distance <= refiner.diagnostics["radius"]


def test_whole_space_is_measured_before_it_gives_up() -> None:
    problem = toy_problem(1, 1.0)
    bench = Bench(problem, smooth_score(problem))
    everything = [Configuration.of([b], [r]) for b in (2, 4, 8) for r in (4, 8, 16)]
    refiner = begun(bench, everything[:6], radius=1)
    assert {r.configuration for r in bench.run(refiner, np.random.default_rng(0))} == set(everything[6:])
    assert "nothing new" in refiner.stop_reason


@pytest.mark.parametrize(
    "options",
    [{"success_tolerance": 0}, {"failure_tolerance": 0}, {"restart_distance": 0}, {"pool_size": 0},
     {"max_evaluations": -1}, {"radius": 0}, {"radius": 17}],
)  # fmt: skip
def test_options_of_turbo_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        refiners.create("turbo", **options)
