"""Trust-region refinement: contract, updates, stop reasons, and the optimum of small spaces by brute force."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from refiner_toys import LADDER, Bench, feasible_starts, smooth_score, toy_problem, toy_proposer

from qratk.core import (
    Budget,
    Candidate,
    Configuration,
    ConfigurationError,
    Evaluation,
    FidelityLadder,
    Problem,
    Request,
    Utility,
)
from qratk.refiners._model_guided import gaussian_process
from qratk.refiners.base import refiners
from qratk.refiners.cocabo import CoCaBO
from qratk.refiners.none import NoRefiner
from qratk.refiners.trust_region import TrustRegion
from qratk.testing import CASES, RefinerContract, ToyEvaluator
from qratk.testing import toy_problem as problem_of

HIGH, LOW = LADDER.highest, LADDER.lowest


class TestTrustRegionContract(RefinerContract):
    steps = 2  # a fit of the process is what these tests take their time for

    @pytest.fixture
    def make(self) -> Callable[[], TrustRegion]:
        return lambda: refiners.create("trust_region", pool_size=60, max_evaluations=4)


class OptionsContract(RefinerContract):
    """For other options of the trust region, which keeps the whole contract: problems that its parts differ on."""

    @pytest.fixture(params=["one layer", "rank 0 and 16 bits", "capped and budgeted", "four shared settings"])
    def problem(self, request: pytest.FixtureRequest) -> Problem:
        return problem_of(**{"num_layers": 4, **CASES[request.param]})


class TestInformedTrustRegionContract(OptionsContract):
    steps = 2

    @pytest.fixture
    def make(self) -> Callable[[], TrustRegion]:
        return lambda: refiners.create(
            "trust_region", pool_size=60, max_evaluations=2, low_fidelity=True, probes=3, probe_rounds=2
        )


class TestCoCaBOContract(OptionsContract):
    steps = 1

    @pytest.fixture
    def make(self) -> Callable[[], CoCaBO]:
        return lambda: refiners.create("cocabo", pool_size=40, max_evaluations=2)


class TestNoRefinerContract(RefinerContract):
    @pytest.fixture
    def make(self) -> Callable[[], NoRefiner]:
        return lambda: refiners.create("none")


def begun(bench: Bench, starts: list[Configuration], **options: Any) -> TrustRegion:
    refiner = refiners.create("trust_region", **options)
    utility = bench.start(starts)
    refiner.begin(toy_proposer(bench.problem), bench.ladder, utility, bench.history)
    return refiner


def toy(num_layers: int = 3, seed: int = 0, starts: int = 4, **options: Any) -> tuple[Bench, TrustRegion]:
    problem = toy_problem(num_layers)
    bench = Bench(problem, smooth_score(problem))
    return bench, begun(bench, feasible_starts(problem, starts, seed), **options)


def high(requests: list[Request]) -> list[Request]:
    return [request for request in requests if request.steps == HIGH]


# The optimum


def evaluations_to_optimum(bench: Bench, requests: list[Request]) -> int:
    """Number of evaluations at the highest rung until a score within 3 % of the range from the best; 100 if never."""
    space = bench.problem.space
    grids = itertools.product(range(3), repeat=2 * space.num_layers)
    scores = [
        bench.score(c) for g in grids if bench.problem.feasible(c := space.from_indices(np.array(g).reshape(-1, 2)))
    ]
    target = max(scores) - 0.03 * (max(scores) - min(scores))
    measured = [bench.score(request.configuration) for request in high(requests)]
    return next((n for n, score in enumerate(measured, 1) if score >= target), 100)


@pytest.mark.slow
def test_optimum_of_a_small_space_is_found_more_often_than_by_random_search() -> None:
    found, found_by_chance = 0, 0
    for seed in range(10):
        bench, refiner = toy(
            seed=seed, radius=4, max_evaluations=6, max_region_evaluations=6, min_expected_improvement=0.0
        )
        found += evaluations_to_optimum(bench, bench.run(refiner, np.random.default_rng(seed))) <= 6
        drawn = feasible_starts(bench.problem, 6, 100 + seed)
        found_by_chance += evaluations_to_optimum(bench, [Request(_candidate(c), HIGH) for c in drawn]) <= 6
    assert found >= 5  # 6 were found when this was written, and none by chance
    assert found > found_by_chance + 3


def _candidate(configuration: Configuration) -> Any:
    return Candidate(configuration, "random")


@pytest.mark.parametrize("name", ["trust_region", "turbo", "cocabo"])
def test_brute_force_optimum_of_a_landscape_is_found_with_enough_evaluations(name: str) -> None:
    evaluator = ToyEvaluator(3, 1, noise=0.0)
    problem = evaluator.problem(like=(4, 4))
    optimum, _ = evaluator.optimum(problem.space, problem.budget)
    bench = Bench(problem, lambda c: evaluator.landscape.true_score(c, 900))
    budgets = {"max_evaluations": 40, "pool_size": 100}
    if name != "turbo":
        budgets |= {"max_region_evaluations": 40, "min_expected_improvement": 0.0}
    refiner = refiners.create(name, **budgets)
    starts = [c for c in problem.space.uniforms() if problem.feasible(c)]
    refiner.begin(toy_proposer(problem), bench.ladder, bench.start(starts), bench.history)
    rng = np.random.default_rng(0)
    while not refiner.finished and bench.history.get(optimum, HIGH) is None:
        bench.step(refiner, rng)
    assert optimum not in starts
    assert bench.history.get(optimum, HIGH) is not None


def test_cocabo_is_the_trust_region_with_its_kernel() -> None:
    runs = []
    for name, options in (("cocabo", {}), ("trust_region", {"kernel": "cocabo"}), ("trust_region", {})):
        bench, _ = toy(4)
        refiner = refiners.create(name, max_evaluations=2, pool_size=40, **options)
        utility = Utility.over(bench.history.at(HIGH), alpha=1.0)
        refiner.begin(toy_proposer(bench.problem), LADDER, utility, bench.history)
        requests = bench.run(refiner, np.random.default_rng(0))
        assert {request.candidate.origin for request in requests} == {name}
        runs.append((refiner.diagnostics, [request.configuration for request in requests]))
    assert runs[0] == runs[1]
    assert runs[0][0]["log_expected_improvement"] != runs[2][0]["log_expected_improvement"]


# Centres and regions


def test_centres_are_the_best_that_are_far_enough_apart() -> None:
    problem = toy_problem(2, 1.0)
    texts = ["8:16 4:8", "8:16 4:4", "2:4 4:8", "4:16 4:8", "2:4 2:16"]
    starts = [Configuration.from_text(text) for text in texts]
    scores = dict(zip(starts, [5.0, 4.0, 3.0, 2.0, 1.0], strict=True))
    refiner = begun(Bench(problem, scores.__getitem__), starts, regions=3, diversity=3)
    # The second lies one edit from the first, the fourth one edit; the fifth lies 2 from the third.
    assert [str(region.centre) for region in refiner.regions] == ["8:16 4:8", "2:4 4:8"]
    assert [region.radius for region in refiner.regions] == [2, 2]


def test_of_equal_utilities_the_smaller_footprint_is_the_centre() -> None:
    problem = toy_problem(2, 1.0)
    starts = [Configuration.from_text(text) for text in ("8:8*2", "4:8*2", "8:4*2")]
    bench = Bench(problem, lambda c: 1.0)
    assert begun(bench, starts, regions=1).regions[0].centre == starts[1]


def test_references_outside_budget_and_ladders_are_no_centres() -> None:
    problem = toy_problem(3)
    bench = Bench(problem, smooth_score(problem))
    starts = feasible_starts(problem, 3, 0)
    bench.evaluate(problem.space.largest, HIGH)
    reference = Configuration.uniform(16, 16, 3)
    bench.history.append(Evaluation(reference, HIGH, 99.0, problem.footprint(problem.space.largest)))
    refiner = begun(bench, starts)
    assert all(region.centre in starts for region in refiner.regions)
    requests = refiner.ask(bench.history, np.random.default_rng(0))
    assert problem.feasible(requests[0].configuration)
    assert refiner.state()["best"] == pytest.approx(
        1.0 if len(starts) == 0 else max(_utilities(bench, starts, refiner))
    )


def _utilities(bench: Bench, configurations: list[Configuration], refiner: TrustRegion) -> list[float]:
    return [refiner._utility.of(bench.history.get(c, HIGH)) for c in configurations]


def test_only_the_region_of_the_candidate_changes_and_by_the_rule() -> None:
    bench, refiner = toy(6, starts=8, min_expected_improvement=0.0, max_evaluations=8)
    rng = np.random.default_rng(0)
    outcomes = set()
    while not refiner.finished:
        before, best = refiner.regions, bench.history.best(HIGH)
        requests = bench.step(refiner, rng)
        if not requests:
            break
        number = int(refiner.diagnostics["region"])
        measured = bench.history.get(requests[0].configuration, HIGH)
        improved = measured.score > best.score
        outcomes.add(improved)
        expected = before[number].after(requests[0].configuration, improved=improved, rule=refiner.rule)
        assert refiner.regions == (*before[:number], expected, *before[number + 1 :])
        assert requests[0].candidate.parents == (before[number].centre.digest,)
        assert requests[0].candidate.phase == "local"
    assert outcomes == {True, False}


def test_candidates_come_from_the_repaired_ball_of_their_region() -> None:
    problem = toy_problem(4, 1.0)  # nothing to repair: the radius itself shows
    bench = Bench(problem, smooth_score(problem))
    refiner = begun(
        bench, feasible_starts(problem, 6, 1), pool_size=50, max_evaluations=5, min_expected_improvement=0.0
    )
    rng = np.random.default_rng(0)
    while not refiner.finished:
        before = refiner.regions
        for request in bench.step(refiner, rng):
            region = before[int(refiner.diagnostics["region"])]
            assert 1 <= problem.space.atomic_distance(request.configuration, region.centre) <= region.radius


def test_a_region_whose_ball_is_exhausted_grows() -> None:
    problem = toy_problem(1, 1.0)
    bench = Bench(problem, lambda c: float(c.bits[0] * 100 + c.ranks[0]))
    starts = [Configuration.from_text(text) for text in ("2:4", "2:8", "4:4")]  # all within 1 edit of 2:4
    scores = {starts[0]: 2.0, starts[1]: 1.0, starts[2]: 0.0}
    bench.score = lambda c: scores.get(c, -1.0)
    refiner = begun(bench, starts, regions=1, radius=1)
    [request] = bench.step(refiner, np.random.default_rng(0))
    assert problem.space.atomic_distance(request.configuration, starts[0]) == 2


def test_exhausted_regions_are_replaced_when_asked_for() -> None:
    counts = {}
    for replace in (False, True):
        bench, refiner = toy(
            5, starts=8, regions=2, max_region_evaluations=1, replace_exhausted=replace, max_evaluations=5,
            min_expected_improvement=0.0,
        )  # fmt: skip
        counts[replace] = len(bench.run(refiner, np.random.default_rng(0)))
    assert counts == {False: 2, True: 5}


# Ties and failures


def test_ties_in_expected_improvement_go_to_the_smaller_footprint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrustRegion, "_scores", lambda self, points, utilities, members, **_: np.zeros(len(members)))
    bench, refiner = toy(3)
    [request] = refiner.ask(bench.history, np.random.default_rng(0))
    pool = refiner._pool(bench.history, np.random.default_rng(0))
    assert bench.problem.bytes(request.configuration) == min(bench.problem.bytes(c) for c in pool)


def test_a_process_that_cannot_be_fitted_is_replaced_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    process = gaussian_process()

    def fail(*args: Any, **options: Any) -> None:
        raise process.FitError("the matrix is not positive definite")

    monkeypatch.setattr(process, "fit", fail)
    chosen = set()
    for seed in range(5):
        bench, refiner = toy(3, max_evaluations=2)
        requests = bench.run(refiner, np.random.default_rng(seed))
        assert len(requests) == 2
        assert refiner.diagnostics["fallback"] == 1.0
        assert "not positive definite" in refiner.fallbacks[0]
        chosen.add(requests[0].configuration)
    assert len(chosen) > 1


@pytest.mark.parametrize("low_fidelity", [False, True])
def test_failed_evaluations_shrink_the_region_and_are_not_asked_again(low_fidelity: bool) -> None:
    bench, refiner = toy(4, low_fidelity=low_fidelity, probes=2, max_evaluations=3)
    bench.fails = lambda request: request.steps == HIGH
    requests = bench.run(refiner, np.random.default_rng(0))
    asked = [request.configuration for request in high(requests)]
    assert len(asked) == len(set(asked)) == 3
    assert sum(region.evaluations for region in refiner.regions) == 3
    assert all(region.radius <= 2 for region in refiner.regions)


def test_a_failure_counts_as_the_worst_utility_seen() -> None:
    bench, refiner = toy(3)
    failed = next(c for c in feasible_starts(bench.problem, 9, 5) if bench.history.get(c, HIGH) is None)
    bench.evaluate(failed, HIGH, failed=True)
    utilities = dict(refiner._measured(bench.history))
    assert utilities[failed] == min(utilities.values())
    assert np.isfinite(list(utilities.values())).all()


def test_what_failed_in_a_short_run_is_not_tried_any_more() -> None:
    bench, refiner = toy(4, low_fidelity=True, probes=3)
    bench.fails = lambda request: request.steps == LOW
    requests = bench.run(refiner, np.random.default_rng(0))
    assert requests
    assert not high(requests)
    assert "failed" in refiner.stop_reason


def test_without_any_success_at_the_highest_rung_there_is_nothing_to_refine() -> None:
    bench, _ = toy(3)
    refiner = refiners.create("trust_region")
    utility = Utility.over(bench.history.at(HIGH), alpha=0.5)
    refiner.begin(toy_proposer(bench.problem), LADDER, utility, type(bench.history)())
    assert refiner.finished
    assert refiner.ask(bench.history, np.random.default_rng(0)) == ()
    assert "no feasible configuration" in refiner.stop_reason


# Stop reasons


def test_stops_when_the_expected_improvement_is_below_the_threshold() -> None:
    bench, refiner = toy(3, min_expected_improvement=1e6)
    assert refiner.ask(bench.history, np.random.default_rng(0)) == ()
    assert refiner.finished
    assert "expected improvement" in refiner.stop_reason


def test_stops_at_the_cap() -> None:
    bench, refiner = toy(5, max_evaluations=2, min_expected_improvement=0.0)
    assert len(bench.run(refiner, np.random.default_rng(0))) == 2
    assert "cap of 2" in refiner.stop_reason


def test_stops_when_every_region_used_up_its_evaluations() -> None:
    bench, refiner = toy(5, regions=1, max_region_evaluations=3, min_expected_improvement=0.0)
    assert len(bench.run(refiner, np.random.default_rng(0))) == 3
    assert "every trust region" in refiner.stop_reason


def test_stops_when_the_whole_space_was_measured() -> None:
    problem = toy_problem(1, 1.0)
    bench = Bench(problem, smooth_score(problem))
    everything = [Configuration.of([b], [r]) for b in (2, 4, 8) for r in (4, 8, 16)]
    refiner = begun(bench, everything[:7], min_expected_improvement=0.0)
    assert {r.configuration for r in bench.run(refiner, np.random.default_rng(0))} == set(everything[7:])
    assert "nothing new" in refiner.stop_reason


def test_no_evaluations_allowed_means_finished_at_once() -> None:
    _, refiner = toy(3, max_evaluations=0)
    assert refiner.finished
    assert refiner.stop_reason


# Short runs


def test_short_runs_precede_each_evaluation_and_are_its_candidates() -> None:
    bench, refiner = toy(6, low_fidelity=True, probes=4, max_evaluations=3, min_expected_improvement=0.0)
    rng = np.random.default_rng(0)
    for _ in range(3):
        probes = bench.step(refiner, rng)
        assert 0 < len(probes) <= 4
        assert {request.steps for request in probes} == {LOW}
        [request] = bench.step(refiner, rng)
        assert request.steps == HIGH
        assert bench.history.get(request.configuration, LOW) is not None
    assert refiner.finished


def test_on_a_ladder_of_one_rung_short_runs_are_left_out() -> None:
    problem = toy_problem(3)
    runs = []
    for low_fidelity in (False, True):
        bench = Bench(problem, smooth_score(problem), ladder=FidelityLadder((HIGH,)))
        refiner = begun(bench, feasible_starts(problem, 4, 0), low_fidelity=low_fidelity, max_evaluations=4)
        runs.append(bench.run(refiner, np.random.default_rng(0)))
        assert refiner.planned_evaluations(bench.ladder) == {HIGH: 4}
    assert runs[0] == runs[1]


def test_points_without_a_short_run_do_not_disturb() -> None:
    bench, refiner = toy(4, low_fidelity=True, max_evaluations=2)
    for configuration in feasible_starts(bench.problem, 12, 9):
        if bench.history.get(configuration, HIGH) is None:
            bench.evaluate(configuration, HIGH)
    assert high(bench.run(refiner, np.random.default_rng(0)))


def test_with_few_pairs_the_best_short_run_decides() -> None:
    problem = toy_problem(4)
    bench = Bench(problem, smooth_score(problem))
    for configuration in feasible_starts(problem, 3, 0):
        bench.evaluate(configuration, HIGH)
    refiner = refiners.create("trust_region", low_fidelity=True, probes=5)
    utility = Utility.over(bench.history.at(HIGH), alpha=1.0)
    refiner.begin(toy_proposer(problem), bench.ladder, utility, bench.history)
    rng = np.random.default_rng(0)
    probes = bench.step(refiner, rng)
    [request] = bench.step(refiner, rng)
    assert request.configuration == max((p.configuration for p in probes), key=bench.score)


# State


@pytest.mark.parametrize("low_fidelity", [False, True])
@pytest.mark.parametrize("between", ["ask and tell", "tell and ask"])
def test_resuming_midway_equals_not_having_stopped(low_fidelity: bool, between: str) -> None:
    options: dict[str, Any] = {"low_fidelity": low_fidelity, "probes": 2, "max_evaluations": 2, "pool_size": 40}
    straight, refiner = toy(4, **options)
    expected = straight.run(refiner, np.random.default_rng(0))
    bench, refiner = toy(4, **options)
    rng, made = np.random.default_rng(0), []

    def reborn() -> TrustRegion:
        again = toy(4, **options)[1]
        again.restore(json.loads(json.dumps(refiner.state(), allow_nan=False)))
        return again

    while not refiner.finished:
        requests = refiner.ask(bench.history, rng)
        if between == "ask and tell":
            refiner = reborn()
        if requests:
            refiner.tell([bench.evaluate(r.configuration, r.steps) for r in requests])
        if between == "tell and ask":
            refiner = reborn()
        made += requests
    assert made == expected
    assert refiner.stop_reason


def test_asking_again_with_the_same_random_state_gives_the_same_request() -> None:
    bench, refiner = toy(6, pool_size=60)
    first = refiner.ask(bench.history, np.random.default_rng(3))
    assert refiner.ask(bench.history, np.random.default_rng(3)) == first


def test_diagnostics_name_the_acquisition_and_the_region() -> None:
    bench, refiner = toy(4)
    bench.step(refiner, np.random.default_rng(0))
    found = refiner.diagnostics
    assert found["log_expected_improvement"] == pytest.approx(np.log(found["expected_improvement"]))
    assert {"pool", "region", "radius", "length_scale", "fallback"} <= found.keys()


def test_budget_on_average_bits_is_respected() -> None:
    base = toy_problem(4, 1.0)
    problem = Problem(base.shapes, base.memory, Budget(base.budget.limit_bytes, max_average_bits=4.0), base.importance)
    bench = Bench(problem, smooth_score(problem))
    refiner = begun(bench, feasible_starts(problem, 4, 0), max_evaluations=4, min_expected_improvement=0.0)
    requests = bench.run(refiner, np.random.default_rng(0))
    assert requests
    assert all(problem.memory.average_bits(request.configuration) <= 4.0 for request in requests)


@pytest.mark.parametrize(
    "options",
    [{"regions": 0}, {"diversity": 0}, {"pool_size": 0}, {"max_evaluations": -1}, {"probes": 0}, {"probe_rounds": 0},
     {"kernel": "rbf"}, {"mix": 1.5}, {"min_expected_improvement": -1.0}, {"radius": 9}, {"max_region_evaluations": 0}],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        refiners.create("trust_region", **options)
