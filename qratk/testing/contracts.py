"""Contract suites: what every strategy of a kind promises, as tests to inherit.

Override the fixture `make`: it returns a callable that builds a new strategy. Everything runs on toy problems, among
them one layer, ladders of one rung, budgets that hardly anything fits, caps on the average bits, and failures.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from qratk.core.configuration import Configuration
from qratk.core.errors import InfeasibleBudgetError, RejectedConfigurationError
from qratk.core.evaluation import Candidate, Evaluation, FidelityLadder, History, Request
from qratk.core.memory import Budget
from qratk.core.problem import Problem
from qratk.core.shared import Setting
from qratk.core.utility import Utility
from qratk.mutations.base import CrossoverOperator, MutationOperator, mutations
from qratk.mutations.proposer import Proposer
from qratk.refiners.base import LocalRefiner
from qratk.repairs.base import RepairPolicy, repairs
from qratk.searchers.base import GlobalSearcher
from qratk.surrogates.base import PromotionSurrogate
from qratk.testing.toy import ToyEvaluator, toy_problem

LADDER = FidelityLadder((100, 300, 900))

RATES: dict[str, Sequence[Setting]] = {"learning_rate": (1e-3, 3e-3, 1e-2)}
SETTINGS: dict[str, Sequence[Setting]] = {
    **RATES,
    "alpha_over_rank": (2,),
    "rslora": (False, True),
    "schedule": ("constant", "linear", "cosine"),
}

CASES: dict[str, dict[str, Any]] = {
    "four layers": {},
    "twenty layers": {"num_layers": 20, "seed": 1},
    "one layer": {"num_layers": 1, "seed": 2},
    "one bit-width": {"bits": (4,), "like": (4, 8), "seed": 3},
    "one rank": {"ranks": (8,), "seed": 4},
    "rank 0 and 16 bits": {"bits": (2, 3, 4, 8, 16), "ranks": (0, 2, 4, 8), "like": (4, 4), "seed": 5},
    "the smallest just fits": {"like": (2, 4), "seed": 6},
    "everything fits, with learning rates": {"like": (8, 16), "shared": RATES, "seed": 7},
    "capped average bits": {"num_layers": 6, "like": (8, 16), "max_average_bits": 3.5, "seed": 8},
    "capped and budgeted": {"num_layers": 6, "like": (4, 4), "max_average_bits": 3.9, "seed": 9},
    "four shared settings": {"shared": SETTINGS, "num_layers": 6, "like": (4, 8), "seed": 11},
}


def some_configurations(problem: Problem, count: int = 12) -> tuple[Configuration, ...]:
    """The extremes of the space and random configurations, feasible or not."""
    rng = np.random.default_rng(11)
    drawn = [problem.space.random(rng) for _ in range(count)]
    return (problem.space.smallest, problem.space.largest, *drawn)


def default_proposer(problem: Problem, repair: str = "greedy") -> Proposer:
    """Proposer with the default operators."""
    operators = [mutations.create(name) for name in ("sensitivity", "coupled", "shared")]
    return Proposer(problem, operators, repairs.create(repair))


class _Contract:
    """Gives every suite the toy problems; `make` is to be overridden."""

    @pytest.fixture(params=list(CASES))
    def problem(self, request: pytest.FixtureRequest) -> Problem:
        """Each of the toy problems in turn."""
        return toy_problem(**{"num_layers": 4, **CASES[request.param]})

    @pytest.fixture
    def make(self) -> Callable[[], Any]:
        """A callable that builds the strategy under test."""
        raise NotImplementedError(f"{type(self).__name__} must override the fixture 'make'")


class MutationContract(_Contract):
    """What every mutation operator promises."""

    def test_result_is_on_the_ladders(self, make: Callable[[], MutationOperator], problem: Problem) -> None:
        operator, rng = make(), np.random.default_rng(0)
        for configuration in some_configurations(problem):
            for _ in range(5):
                problem.space.validate(operator.mutate(problem, configuration, rng))

    def test_same_generator_state_gives_the_same_result(
        self, make: Callable[[], MutationOperator], problem: Problem
    ) -> None:
        for configuration in some_configurations(problem):
            first = make().mutate(problem, configuration, np.random.default_rng(5))
            assert first == make().mutate(problem, configuration, np.random.default_rng(5))

    def test_operator_keeps_no_memory_of_earlier_calls(
        self, make: Callable[[], MutationOperator], problem: Problem
    ) -> None:
        used = make()
        for configuration in some_configurations(problem):
            used.mutate(problem, configuration, np.random.default_rng(3))
        start = problem.space.smallest
        expected = make().mutate(problem, start, np.random.default_rng(5))
        assert used.mutate(problem, start, np.random.default_rng(5)) == expected

    def test_input_is_left_as_it_was(self, make: Callable[[], MutationOperator], problem: Problem) -> None:
        operator, rng = make(), np.random.default_rng(0)
        importance = {knob: scores.copy() for knob, scores in problem.normalised_importance.items()}
        tables = {knob: problem.table(knob).copy() for knob in ("bits", "rank")}
        for configuration in some_configurations(problem):
            text = str(configuration)
            operator.mutate(problem, configuration, rng)
            assert str(configuration) == text
        for knob, scores in problem.normalised_importance.items():
            np.testing.assert_array_equal(scores, importance[knob])
            np.testing.assert_array_equal(problem.table(knob), tables[knob])

    def test_global_random_state_is_not_touched(self, make: Callable[[], MutationOperator], problem: Problem) -> None:
        before = np.random.get_state()[1].copy()  # type: ignore[index]
        make().mutate(problem, problem.space.smallest, np.random.default_rng(0))
        np.testing.assert_array_equal(np.random.get_state()[1], before)  # type: ignore[index]

    def test_operator_that_does_not_apply_changes_nothing(self, make: Callable[[], MutationOperator]) -> None:
        operator, rng = make(), np.random.default_rng(0)
        for problem in (toy_problem(**{"num_layers": 4, **case}) for case in CASES.values()):
            for configuration in () if operator.applies(problem) else some_configurations(problem):
                assert operator.mutate(problem, configuration, rng) == configuration

    def test_operator_of_settings_alone_varies_each_of_them_and_no_layer(
        self, make: Callable[[], MutationOperator]
    ) -> None:
        problem, operator, rng = toy_problem(4, 0, shared=SETTINGS), make(), np.random.default_rng(0)
        if operator.applies(toy_problem(4, 0)):
            pytest.skip("it varies layers")
        start = problem.space.uniform(4, 8)
        varied = {operator.mutate(problem, start, rng) for _ in range(200)}
        assert {c.layers for c in varied} == {start.layers}
        changed = {name for c in varied for name, _ in set(c.shared) - set(start.shared)}
        assert changed == {name for name, values in SETTINGS.items() if len(values) > 1}

    def test_repeated_calls_vary_every_layer(self, make: Callable[[], MutationOperator]) -> None:
        problem, operator, rng = toy_problem(4, 0), make(), np.random.default_rng(0)
        if not operator.applies(problem):
            pytest.skip("it varies no layer")
        changed: set[int] = set()
        configuration = problem.space.uniform(4, 8)
        for _ in range(2000):
            varied = operator.mutate(problem, configuration, rng)
            changed |= {
                layer for layer, (a, b) in enumerate(zip(varied.layers, configuration.layers, strict=True)) if a != b
            }
        assert changed == {0, 1, 2, 3}

    def test_space_of_one_configuration_returns_it(self, make: Callable[[], MutationOperator]) -> None:
        problem = toy_problem(3, bits=(4,), ranks=(8,))
        only = problem.space.smallest
        assert make().mutate(problem, only, np.random.default_rng(0)) == only


class CrossoverContract(_Contract):
    """What every crossover operator promises."""

    def test_every_choice_of_the_child_is_one_of_its_parents(
        self, make: Callable[[], CrossoverOperator], problem: Problem
    ) -> None:
        operator, rng = make(), np.random.default_rng(0)
        for first, second in some_pairs(problem):
            for _ in range(5):
                child = operator.cross(problem, first, second, rng)
                choices = [*zip(child.layers, first.layers, second.layers, strict=True)]
                settings = [*zip(child.shared, first.shared, second.shared, strict=True)]
                assert all(own in (ours, theirs) for own, ours, theirs in (*choices, *settings))

    def test_same_generator_state_gives_the_same_child(
        self, make: Callable[[], CrossoverOperator], problem: Problem
    ) -> None:
        for first, second in some_pairs(problem):
            child = make().cross(problem, first, second, np.random.default_rng(5))
            assert child == make().cross(problem, first, second, np.random.default_rng(5))

    def test_operator_keeps_no_memory_of_earlier_calls(
        self, make: Callable[[], CrossoverOperator], problem: Problem
    ) -> None:
        used = make()
        for first, second in some_pairs(problem):
            used.cross(problem, first, second, np.random.default_rng(3))
        parents = problem.space.smallest, problem.space.largest
        expected = make().cross(problem, *parents, np.random.default_rng(5))
        assert used.cross(problem, *parents, np.random.default_rng(5)) == expected

    def test_parents_are_left_as_they_were(self, make: Callable[[], CrossoverOperator], problem: Problem) -> None:
        operator, rng = make(), np.random.default_rng(0)
        for first, second in some_pairs(problem):
            texts = str(first), str(second)
            operator.cross(problem, first, second, rng)
            assert (str(first), str(second)) == texts

    def test_global_random_state_is_not_touched(self, make: Callable[[], CrossoverOperator], problem: Problem) -> None:
        before = np.random.get_state()[1].copy()  # type: ignore[index]
        make().cross(problem, problem.space.smallest, problem.space.largest, np.random.default_rng(0))
        np.testing.assert_array_equal(np.random.get_state()[1], before)  # type: ignore[index]

    def test_equal_parents_have_an_equal_child(self, make: Callable[[], CrossoverOperator], problem: Problem) -> None:
        operator, rng = make(), np.random.default_rng(0)
        for parent in some_configurations(problem):
            assert operator.cross(problem, parent, parent, rng) == parent

    def test_every_layer_may_come_from_either_parent(self, make: Callable[[], CrossoverOperator]) -> None:
        problem, operator, rng = toy_problem(4, 0), make(), np.random.default_rng(0)
        first, second = problem.space.smallest, problem.space.largest
        seen = [set[bool]() for _ in range(4)]
        for _ in range(500):
            child = operator.cross(problem, first, second, rng)
            for layer, choice in enumerate(child.layers):
                seen[layer].add(choice == second.layers[layer])
        assert seen == [{False, True}] * 4

    def test_most_children_differ_from_both_parents(self, make: Callable[[], CrossoverOperator]) -> None:
        problem, operator, rng = toy_problem(4, 0), make(), np.random.default_rng(0)
        parents = problem.space.smallest, problem.space.largest
        children = [operator.cross(problem, *parents, rng) for _ in range(200)]
        assert sum(child not in parents for child in children) > 100

    def test_without_a_mate_the_configuration_stays_as_it_is(
        self, make: Callable[[], CrossoverOperator], problem: Problem
    ) -> None:
        operator, rng = make(), np.random.default_rng(0)
        for configuration in some_configurations(problem):
            assert operator.mutate(problem, configuration, rng) == configuration


def some_pairs(problem: Problem) -> list[tuple[Configuration, Configuration]]:
    """Pairs of different kinds of configurations, a few of them equal in tiny spaces."""
    configurations = some_configurations(problem)
    return list(itertools.pairwise(configurations))


class RepairContract(_Contract):
    """What every repair policy promises."""

    def test_shared_settings_stay_as_they_are(self, make: Callable[[], RepairPolicy], problem: Problem) -> None:
        for configuration in some_configurations(problem, 40):
            repaired = self._repaired(make(), problem, configuration)
            assert repaired is None or repaired.shared == configuration.shared

    def test_result_is_feasible_and_on_the_ladders(self, make: Callable[[], RepairPolicy], problem: Problem) -> None:
        for configuration in some_configurations(problem, 40):
            repaired = self._repaired(make(), problem, configuration)
            if repaired is not None:
                problem.space.validate(repaired)
                assert problem.violation(repaired) == 0.0

    def test_feasible_configuration_stays_unchanged(self, make: Callable[[], RepairPolicy], problem: Problem) -> None:
        feasible = [c for c in some_configurations(problem, 40) if problem.feasible(c)]
        assert feasible
        for configuration in feasible:
            policy = make()
            repaired = policy.repair(problem, configuration)
            assert repaired == configuration or (policy.fills and repaired.bits == configuration.bits)

    def test_repair_is_idempotent(self, make: Callable[[], RepairPolicy], problem: Problem) -> None:
        for configuration in some_configurations(problem):
            once = self._repaired(make(), problem, configuration)
            if once is not None:
                assert make().repair(problem, once) == once

    def test_repair_is_deterministic(self, make: Callable[[], RepairPolicy], problem: Problem) -> None:
        policy = make()
        for configuration in some_configurations(problem):
            first = self._repaired(policy, problem, configuration)
            assert first == self._repaired(policy, problem, configuration)
            assert first == self._repaired(make(), problem, configuration)

    def test_impossible_budget_raises(self, make: Callable[[], RepairPolicy]) -> None:
        fitting = toy_problem(4)
        budget = Budget(fitting.bytes(fitting.space.smallest) - 1)
        problem = Problem(fitting.shapes, fitting.memory, budget, fitting.importance)
        with pytest.raises(InfeasibleBudgetError):
            make().repair(problem, problem.space.largest)

    @staticmethod
    def _repaired(policy: RepairPolicy, problem: Problem, configuration: Configuration) -> Configuration | None:
        try:
            return policy.repair(problem, configuration)
        except RejectedConfigurationError:
            return None


class SurrogateContract(_Contract):
    """What every promotion surrogate promises."""

    def test_nothing_is_trusted_before_a_fit(self, make: Callable[[], PromotionSurrogate]) -> None:
        assert not make().trusted
        assert make().quality is None

    @pytest.mark.parametrize("pairs", [0, 1, 2])
    def test_too_few_pairs_are_not_trusted(
        self, make: Callable[[], PromotionSurrogate], problem: Problem, pairs: int
    ) -> None:
        surrogate = make()
        surrogate.fit(problem, measured(problem, pairs), low=100, high=900)
        assert not surrogate.trusted
        assert surrogate.quality is not None
        assert surrogate.quality.pairs == min(pairs, len(measured(problem, pairs).at(900)))

    def test_predictions_come_in_order_and_are_finite(
        self, make: Callable[[], PromotionSurrogate], problem: Problem
    ) -> None:
        for pairs in (0, 3, 30):
            surrogate, history = make(), measured(problem, pairs)
            surrogate.fit(problem, history, low=100, high=900)
            asked = [e for e in measured(problem, 35) if e.steps == 100]
            predictions = surrogate.predict(problem, asked)
            assert [p.configuration for p in predictions] == [e.configuration for e in asked]
            assert all(np.isfinite(p.mean) and np.isfinite(p.std) and p.std >= 0 for p in predictions)
            assert surrogate.predict(problem, []) == ()

    def test_fit_is_deterministic_and_forgets_the_last(
        self, make: Callable[[], PromotionSurrogate], problem: Problem
    ) -> None:
        asked = [e for e in measured(problem, 20) if e.steps == 100]
        used, fresh = make(), make()
        used.fit(problem, measured(problem, 8), low=300, high=900)
        for surrogate in (used, fresh):
            surrogate.fit(problem, measured(problem, 20), low=100, high=900)
        assert used.predict(problem, asked) == fresh.predict(problem, asked)
        assert used.trusted == fresh.trusted

    def test_quality_is_a_correlation_over_the_pairs(
        self, make: Callable[[], PromotionSurrogate], problem: Problem
    ) -> None:
        surrogate, history = make(), measured(problem, 30)
        surrogate.fit(problem, history, low=100, high=900)
        quality = surrogate.quality
        assert quality is not None
        assert quality.pairs == len(history.paired(100, 900))
        for figure in (quality.spearman, quality.pearson, quality.low_fidelity_spearman):
            assert np.isnan(figure) or -1.0 <= figure <= 1.0

    def test_failed_evaluation_is_never_predicted_best(self, make: Callable[[], PromotionSurrogate]) -> None:
        problem, surrogate = toy_problem(4), make()
        history = measured(problem, 20)
        surrogate.fit(problem, history, low=100, high=900)
        failure = failed(problem, problem.space.smallest, 100)
        asked = [*(e for e in history if e.steps == 100), failure]
        means = {p.configuration: p.mean for p in surrogate.predict(problem, asked)[-1:]}
        others = [p.mean for p in surrogate.predict(problem, asked)[:-1]]
        assert means[problem.space.smallest] < min(others)

    def test_constant_scores_are_survived(self, make: Callable[[], PromotionSurrogate]) -> None:
        problem, surrogate = toy_problem(4), make()
        history = History(
            Evaluation(e.configuration, e.steps, 1.0, e.footprint) for e in measured(problem, 20) if e.steps != 300
        )
        surrogate.fit(problem, history, low=100, high=900)
        assert not surrogate.trusted
        assert all(p.mean == pytest.approx(1.0) for p in surrogate.predict(problem, history.at(100)))


def measured(problem: Problem, pairs: int) -> History:
    """What the toy evaluator says of `pairs` random configurations (fewer in tiny spaces) on every rung."""
    rng, evaluator = np.random.default_rng(21), ToyEvaluator(problem.num_layers, seed=1)
    drawn = dict.fromkeys(problem.space.random(rng) for _ in range(pairs))
    return History(evaluator.measure(c, steps) for c in drawn for steps in LADDER.steps)


def failed(problem: Problem, configuration: Configuration, steps: int) -> Evaluation:
    """A failed evaluation."""
    return Evaluation(
        configuration, steps, float("-inf"), problem.footprint(configuration), status="failed", reason="for a test"
    )


class SearcherContract(_Contract):
    """What every global searcher promises."""

    generations = 3

    def test_candidates_are_feasible_new_and_no_more_than_announced(
        self, make: Callable[[], GlobalSearcher], problem: Problem
    ) -> None:
        seen: set[Configuration] = set()
        searcher, announced = make(), make().generation_size
        for candidates in self._search(searcher, problem):
            configurations = [candidate.configuration for candidate in candidates]
            for configuration in configurations:
                problem.space.validate(problem.space.settled(configuration))
                assert problem.feasible(configuration)
            assert 0 < len(set(configurations)) == len(configurations) <= announced
            assert not seen & set(configurations)
            seen |= set(configurations)
        assert seen

    def test_baselines_in_the_history_are_not_proposed(
        self, make: Callable[[], GlobalSearcher], problem: Problem
    ) -> None:
        evaluator = ToyEvaluator(problem.num_layers)
        uniforms = [c for c in problem.space.uniforms() if problem.feasible(c)]
        history = History(evaluator.measure(c, 900) for c in uniforms)
        for candidates in self._search(make(), problem, history):
            assert not {candidate.configuration for candidate in candidates} & set(uniforms)

    def test_begin_forgets_the_last_search(self, make: Callable[[], GlobalSearcher]) -> None:
        used = make()
        list(self._search(used, toy_problem(5, 3)))
        problem = toy_problem(4)
        assert list(self._search(used, problem)) == list(self._search(make(), problem))

    def test_same_seed_gives_the_same_search_also_from_its_state_as_json(
        self, make: Callable[[], GlobalSearcher], problem: Problem
    ) -> None:
        straight = list(self._search(make(), problem))
        assert list(self._search(make(), problem)) == straight
        assert list(self._search(make(), problem, reborn=make)) == straight

    def test_failed_evaluations_are_survived(self, make: Callable[[], GlobalSearcher], problem: Problem) -> None:
        for failures in (0.5, 1.0):
            for candidates in self._search(make(), problem, failures=failures):
                assert all(problem.feasible(candidate.configuration) for candidate in candidates)

    def test_tiny_space_is_exhausted_and_ends(self, make: Callable[[], GlobalSearcher]) -> None:
        problem = toy_problem(1, like=(8, 8))
        self.generations, limit = 40, self.generations
        try:
            found = [c.configuration for candidates in self._search(make(), problem) for c in candidates]
        finally:
            self.generations = limit
        assert set(found) == {c for c in problem.space.uniforms() if problem.feasible(c)}

    def test_repair_that_rejects_is_survived(self, make: Callable[[], GlobalSearcher], problem: Problem) -> None:
        for candidates in self._search(make(), problem, repair="reject"):
            assert all(problem.feasible(candidate.configuration) for candidate in candidates)

    def _search(
        self,
        searcher: GlobalSearcher,
        problem: Problem,
        history: History | None = None,
        *,
        failures: float = 0.0,
        reborn: Callable[[], GlobalSearcher] | None = None,
        repair: str = "greedy",
    ) -> Iterator[tuple[Candidate, ...]]:
        """Generations as the loop runs them: all at the lowest rung, a third at the next, three at the highest."""
        history = History() if history is None else history
        evaluator = ToyEvaluator(problem.num_layers, failures=failures)
        rng, proposer = np.random.default_rng(7), default_proposer(problem, repair)
        searcher.begin(proposer, LADDER)
        for _ in range(self.generations):
            if searcher.finished:
                return
            candidates = searcher.ask(history, rng)
            if not candidates:
                return
            yield candidates
            told = promoted(evaluator, candidates, LADDER)
            for evaluation in told:
                history.append(evaluation)
            searcher.tell(told)
            if reborn is not None:
                state = json.loads(json.dumps(searcher.state(), allow_nan=False))
                searcher = reborn()
                searcher.begin(proposer, LADDER)
                searcher.restore(state)


def promoted(evaluator: ToyEvaluator, candidates: Sequence[Candidate], ladder: FidelityLadder) -> list[Evaluation]:
    """What is measured of a generation when the better ones are promoted from rung to rung."""
    told: list[Evaluation] = []
    pool = list(candidates)
    sizes = ladder.sizes(len(pool), min(3, len(pool)))
    for steps, size in zip(ladder.steps, (*sizes[1:], 0), strict=True):
        measured_here = list(evaluator.evaluate([Request(candidate, steps) for candidate in pool]))
        told += measured_here
        ranked = sorted(zip(measured_here, pool, strict=True), key=lambda pair: -pair[0].score)
        pool = [candidate for evaluation, candidate in ranked[:size] if evaluation.ok]
    return told


class RefinerContract(_Contract):
    """What every local refiner promises. `steps` bounds how many asks are made of it."""

    steps = 4

    def test_requests_are_feasible_and_new_at_their_steps(
        self, make: Callable[[], LocalRefiner], problem: Problem
    ) -> None:
        measured_before: set[tuple[Configuration, int]] = set()
        for requests in self._refine(make(), problem):
            for request in requests:
                problem.space.validate(request.configuration)
                assert problem.feasible(request.configuration)
                assert request.steps in LADDER.steps
                assert (request.configuration, request.steps) not in measured_before
                measured_before.add((request.configuration, request.steps))

    def test_same_seed_gives_the_same_refinement(self, make: Callable[[], LocalRefiner]) -> None:
        problem = toy_problem(4)
        assert list(self._refine(make(), problem)) == list(self._refine(make(), problem))

    def test_state_survives_json_and_continues_identically(self, make: Callable[[], LocalRefiner]) -> None:
        for problem in (toy_problem(12, 1), toy_problem(4, shared=SETTINGS)):
            straight = list(self._refine(make(), problem))
            assert list(self._refine(make(), problem, reborn=make)) == straight

    def test_no_more_is_evaluated_than_was_planned(self, make: Callable[[], LocalRefiner]) -> None:
        refiner = make()
        planned = refiner.planned_evaluations(LADDER)
        asked = [request.steps for requests in self._refine(refiner, toy_problem(6), asks=200) for request in requests]
        for steps in LADDER.steps:
            assert asked.count(steps) <= planned.get(steps, 0)

    def test_finished_refiner_says_why(self, make: Callable[[], LocalRefiner]) -> None:
        refiner = make()
        list(self._refine(refiner, toy_problem(2, like=(4, 4)), asks=200))
        assert refiner.finished
        assert refiner.stop_reason

    def test_failed_evaluations_are_survived(self, make: Callable[[], LocalRefiner]) -> None:
        problem = toy_problem(4)
        for requests in self._refine(make(), problem, failures=1.0):
            assert all(problem.feasible(request.configuration) for request in requests)

    def test_diagnostics_are_numbers(self, make: Callable[[], LocalRefiner]) -> None:
        refiner = make()
        for _ in self._refine(refiner, toy_problem(4)):
            assert all(isinstance(value, int | float) for value in refiner.diagnostics.values())

    def _refine(
        self,
        refiner: LocalRefiner,
        problem: Problem,
        *,
        asks: int | None = None,
        failures: float = 0.0,
        reborn: Callable[[], LocalRefiner] | None = None,
    ) -> Iterator[tuple[Request, ...]]:
        sound, evaluator = ToyEvaluator(problem.num_layers), ToyEvaluator(problem.num_layers, failures=failures)
        history = _phase_one(problem, sound)
        utility = Utility.over(history.at(LADDER.highest), alpha=0.6)
        rng, proposer = np.random.default_rng(7), default_proposer(problem)
        refiner.begin(proposer, LADDER, utility, _copied(history))
        start = _copied(history)
        for _ in range(self.steps if asks is None else asks):
            if refiner.finished:
                return
            requests = refiner.ask(history, rng)
            if not requests:
                return
            yield requests
            told = list(evaluator.evaluate(requests))
            for evaluation in told:
                history.append(evaluation)
            refiner.tell(told)
            if reborn is not None:
                state = json.loads(json.dumps(refiner.state(), allow_nan=False))
                refiner = reborn()
                refiner.begin(proposer, LADDER, utility, start)
                refiner.restore(state)


def _phase_one(problem: Problem, evaluator: ToyEvaluator) -> History:
    """Twelve feasible configurations measured on every rung."""
    rng, policy = np.random.default_rng(31), repairs.create("greedy")
    drawn = [policy.repair(problem, problem.space.random(rng)) for _ in range(12)]
    return History(evaluator.measure(c, steps) for c in dict.fromkeys(drawn) for steps in LADDER.steps)


def _copied(history: History) -> History:
    return History(history)
