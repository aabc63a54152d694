"""The bridge to Optuna keeps the contract, learns, and goes on identically after a resume."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable

import numpy as np
import pytest
from qratk_optuna import OptunaSearch, standings

from qratk import (
    REGISTRIES,
    Configuration,
    ConfigurationError,
    Evaluation,
    FidelityLadder,
    GlobalSearcher,
    History,
    Problem,
    Request,
)
from qratk.testing import CASES, LADDER, SearcherContract, ToyEvaluator, default_proposer, failed, promoted, toy_problem


class SmallerContract(SearcherContract):
    """Of the slower samplers: three of the problems, and fewer layers."""

    @pytest.fixture(params=["one layer", "one rank", "capped and budgeted"])
    def problem(self, request: pytest.FixtureRequest) -> Problem:
        return toy_problem(**{**CASES[request.param], "num_layers": 1 if request.param == "one layer" else 3})


class TestTPEContract(SmallerContract):
    @pytest.fixture
    def make(self) -> Callable[[], GlobalSearcher]:
        return lambda: OptunaSearch("tpe", offspring=6, sampler_options={"n_startup_trials": 4})


class TestCMAESContract(SearcherContract):
    @pytest.fixture
    def make(self) -> Callable[[], GlobalSearcher]:
        return lambda: OptunaSearch("cmaes", offspring=5)


class TestNSGA2Contract(SearcherContract):
    @pytest.fixture
    def make(self) -> Callable[[], GlobalSearcher]:
        return lambda: OptunaSearch("nsga2", offspring=5)


class TestGaussianProcessContract(SmallerContract):
    generations = 2

    @pytest.fixture(params=["one rank"])
    def problem(self, request: pytest.FixtureRequest) -> Problem:
        return toy_problem(**{**CASES[request.param], "num_layers": 2})

    @pytest.fixture
    def make(self) -> Callable[[], GlobalSearcher]:
        return lambda: OptunaSearch("gp", offspring=2, sampler_options={"n_startup_trials": 1})

    def test_tiny_space_is_exhausted_and_ends(self, make: Callable[[], GlobalSearcher]) -> None:
        super().test_tiny_space_is_exhausted_and_ends(lambda: OptunaSearch("gp", offspring=4))


class TestRandomContract(SmallerContract):
    @pytest.fixture
    def make(self) -> Callable[[], GlobalSearcher]:
        return lambda: OptunaSearch("random", offspring=6, encoding="categorical")


def best_of(searcher: GlobalSearcher, seed: int, *, layers: int = 8, generations: int = 3) -> float:
    """Best score without noise of what a search asks for, everything measured at the highest rung."""
    problem, evaluator = toy_problem(layers, seed), ToyEvaluator(layers, seed)
    rng, history = np.random.default_rng(seed), History()
    searcher.begin(default_proposer(problem), FidelityLadder((900,)))
    for _ in range(generations):
        told = list(evaluator.evaluate([Request(candidate, 900) for candidate in searcher.ask(history, rng)]))
        for evaluation in told:
            history.append(evaluation)
        searcher.tell(told)
    return max(evaluator.landscape.true_score(e.configuration, 900) for e in history)


@pytest.mark.parametrize("sampler", [pytest.param("tpe", marks=pytest.mark.slow), "cmaes"])
def test_guided_sampler_beats_the_random_one_on_average_over_ten_landscapes(sampler: str) -> None:
    gains = [
        best_of(OptunaSearch(sampler, offspring=10), seed) - best_of(OptunaSearch("random", offspring=10), seed)
        for seed in range(10)
    ]
    assert np.mean(gains) > 0.005


def advanced(searcher: GlobalSearcher, problem: Problem, generations: int) -> tuple[History, np.random.Generator]:
    """History and generator after so many generations, the searcher having been told of all."""
    evaluator, rng, history = ToyEvaluator(problem.num_layers), np.random.default_rng(3), History()
    searcher.begin(default_proposer(problem), LADDER)
    for _ in range(generations):
        told = promoted(evaluator, searcher.ask(history, rng), LADDER)
        for evaluation in told:
            history.append(evaluation)
        searcher.tell(told)
    return history, rng


@pytest.mark.parametrize("sampler", ["tpe", "cmaes", "nsga2", "gp"])
def test_searcher_resumed_between_ask_and_tell_asks_for_the_same(sampler: str) -> None:
    problem = toy_problem(3)
    searcher, resumed = (OptunaSearch(sampler, offspring=3 if sampler == "gp" else 6) for _ in range(2))
    history, rng = advanced(searcher, problem, 2 if sampler == "gp" else 3)
    candidates = searcher.ask(history, rng)
    state, random = json.loads(json.dumps(searcher.state(), allow_nan=False)), rng.bit_generator.state
    told = promoted(ToyEvaluator(3), candidates, LADDER)
    for evaluation in told:
        history.append(evaluation)
    searcher.tell(told)
    straight = searcher.ask(history, rng)
    rng.bit_generator.state = random
    resumed.begin(default_proposer(problem), LADDER)
    resumed.restore(state)
    resumed.tell(told)
    assert resumed.ask(history, rng) == straight


def test_cma_es_moves_on_a_generation_with_each_of_ours_and_saves_numbers_only() -> None:
    searcher = OptunaSearch("cmaes", offspring=6)
    advanced(searcher, toy_problem(5), 4)
    notes = searcher.state()["notes"]
    assert (
        sorted(held["cma:generation"] for held in notes.values()) == [0] * 6 + [1] * 6 + [2] * 6
    )  # the first is random
    assert {type(value) for held in notes.values() for value in held.values()} == {int}


def test_sampler_is_told_of_the_repaired_configuration() -> None:
    from qratk_optuna._study import Board

    problem = toy_problem(4, like=(2, 4))
    searcher = OptunaSearch("tpe", offspring=3)
    history, _ = advanced(searcher, problem, 1)
    with Board(searcher, problem, history, {}, seed=0) as board:
        told = {board._configuration(trial.params) for trial in board._study.get_trials()}
    assert told == {evaluation.configuration for evaluation in history}
    assert all(problem.feasible(configuration) for configuration in told)


def measured(problem: Problem, bits: tuple[int, ...], steps: int, score: float) -> Evaluation:
    configuration = Configuration.of(bits, (8,) * len(bits))
    return Evaluation(configuration, steps, score, problem.footprint(configuration))


def test_standings_put_the_higher_rung_first_and_failures_last() -> None:
    problem = toy_problem(2)
    bad, good, short = (measured(problem, bits, *at) for bits, at in [
        ((2, 2), (900, -3.0)), ((2, 4), (900, -1.0)), ((4, 2), (300, 5.0)),
    ])  # fmt: skip
    broken = failed(problem, Configuration.of((4, 4), (8, 8)), 900)
    lower = measured(problem, (2, 4), 300, -9.0)
    found = standings(problem, History([lower, short, broken, bad, good]))
    order = [broken, short, bad, good]
    values = [found[e.configuration] for e in order]
    assert values == sorted(values)
    assert values[0] == pytest.approx(-values[-1]) == pytest.approx(-1.1503494)  # the normal quantile of 7 / 8


def test_equal_scores_share_a_standing() -> None:
    problem = toy_problem(2)
    tied = [measured(problem, bits, 900, 1.0) for bits in ((2, 2), (2, 4), (4, 2))]
    assert set(standings(problem, History(tied)).values()) == {0.0}


def test_optuna_is_silent_and_keeps_its_own_verbosity(capfd: pytest.CaptureFixture[str]) -> None:
    import optuna

    before = optuna.logging.get_verbosity()
    advanced(OptunaSearch("cmaes", offspring=3), toy_problem(3), 2)
    assert optuna.logging.get_verbosity() == before
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("optuna").level == before


def test_global_random_state_is_not_touched() -> None:
    before = np.random.get_state()[1].copy()  # type: ignore[index]
    advanced(OptunaSearch("tpe", offspring=4, sampler_options={"n_startup_trials": 2}), toy_problem(3), 2)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # type: ignore[index]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"offspring": 0}, "offspring"),
        ({"sampler": "annealing"}, "one of"),
        ({"sampler": "cmaes", "encoding": "categorical"}, "ordinal"),
        ({"sampler": "cmaes", "objectives": "score_and_bytes"}, "one objective"),
        ({"sampler_options": {"seed": 1}}, "seed"),
        ({"sampler_options": {"startup": 3}}, "startup"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        OptunaSearch(**options)  # type: ignore[arg-type]


def test_it_is_found_by_its_name() -> None:
    assert isinstance(REGISTRIES["searchers"].create("optuna", sampler="random"), OptunaSearch)
