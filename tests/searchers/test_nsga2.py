from __future__ import annotations

import numpy as np
import pytest

from qratk.core import FidelityLadder, History, Request
from qratk.core.errors import ConfigurationError
from qratk.mutations._proposer import Proposer
from qratk.mutations.base import mutations
from qratk.repairs.base import repairs
from qratk.searchers.base import searchers
from qratk.testing import ToyEvaluator


def search(name: str, evaluator: ToyEvaluator, generations: int, seed: int = 0, **options) -> tuple[History, list]:
    """A search whose candidates all run to the highest of a single rung; the best true score after each generation."""
    problem, history, rng = evaluator.problem(), History(), np.random.default_rng(seed)
    operators = [mutations.create("sensitivity"), mutations.create("coupled")]
    searcher = searchers.create(name, **options)
    searcher.begin(Proposer(problem, operators, repairs.create("greedy")), FidelityLadder((900,)))
    best = []
    for _ in range(generations):
        evaluations = list(evaluator.evaluate([Request(c, 900) for c in searcher.ask(history, rng)]))
        for evaluation in evaluations:
            history.append(evaluation)
        searcher.tell(evaluations)
        best.append(history.best(900).score)
    return history, best


def test_search_finds_the_brute_force_optimum_of_small_problems():
    for seed in range(3):
        evaluator = ToyEvaluator(3, seed, noise=0.0)
        problem = evaluator.problem()
        optimum, score = evaluator.optimum(problem.space, problem.budget)
        history, _ = search("nsga2", evaluator, 6)
        assert history.best(900).configuration == optimum
        assert history.best(900).score == pytest.approx(score)


def test_guided_search_beats_random_search():
    gains = []
    for seed in range(3):
        guided = search("nsga2", ToyEvaluator(16, seed, noise=0.0), 5)[1][-1]
        gains.append(guided - search("random", ToyEvaluator(16, seed, noise=0.0), 5)[1][-1])
    assert min(gains) > 0


def test_warm_start_leads_from_the_first_generation():
    for seed in range(3):
        warm = search("nsga2", ToyEvaluator(16, seed, noise=0.0), 1)[1][0]
        assert warm > search("nsga2", ToyEvaluator(16, seed, noise=0.0), 1, warm_start=False)[1][0]


def test_measured_baselines_join_the_population():
    evaluator = ToyEvaluator(6)
    problem, rng = evaluator.problem(), np.random.default_rng(0)
    baselines = [evaluator.measure(c, 900) for c in problem.space.uniforms() if problem.feasible(c)]
    searcher = searchers.create("nsga2")
    searcher.begin(Proposer(problem, [mutations.create("uniform")], repairs.create("greedy")), FidelityLadder((900,)))
    searcher.ask(History(baselines), rng)
    members = {member["configuration"] for member in searcher.state()["population"]}
    assert members == {str(e.configuration) for e in baselines}


def test_population_is_no_larger_than_asked():
    evaluator = ToyEvaluator(8)
    problem, rng, history = evaluator.problem(), np.random.default_rng(0), History()
    searcher = searchers.create("nsga2", population=7, offspring=12)
    searcher.begin(Proposer(problem, [mutations.create("uniform")], repairs.create("greedy")), FidelityLadder((900,)))
    for _ in range(3):
        for evaluation in evaluator.evaluate([Request(c, 900) for c in searcher.ask(history, rng)]):
            history.append(evaluation)
        searcher.tell(list(history)[-12:])
        assert len(searcher.state()["population"]) == 7


@pytest.mark.parametrize("options", [{"population": 1}, {"offspring": 0}, {"epsilon": 0.0}])
def test_senseless_options_are_refused(options):
    with pytest.raises(ConfigurationError):
        searchers.create("nsga2", **options)


def test_crossover_gets_mates_from_the_population():
    evaluator = ToyEvaluator(8)
    problem, rng, history = evaluator.problem(), np.random.default_rng(0), History()
    operators = [mutations.create("crossover_uniform"), mutations.create("crossover_block")]
    searcher = searchers.create("nsga2", population=10, offspring=10)
    searcher.begin(Proposer(problem, operators, repairs.create("greedy")), FidelityLadder((900,)))
    for generation in range(2):
        candidates = searcher.ask(history, rng)
        evaluations = list(evaluator.evaluate([Request(candidate, 900) for candidate in candidates]))
        for evaluation in evaluations:
            history.append(evaluation)
        searcher.tell(evaluations)
        if generation == 0:
            digests = {evaluation.configuration.digest for evaluation in evaluations}
    crossed = [candidate for candidate in candidates if candidate.origin.startswith("crossover")]
    assert len(crossed) > 5
    assert all(len(candidate.parents) >= 2 and set(candidate.parents) <= digests for candidate in crossed)
