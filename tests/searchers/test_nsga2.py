from __future__ import annotations

import numpy as np
import pytest
from searcher_toys import ONE_RUNG, begun, best_score, gain, measured_uniforms, proposer_of, search

from qratk.core import History
from qratk.core.errors import ConfigurationError
from qratk.searchers.base import searchers
from qratk.testing import ToyEvaluator


def test_search_finds_the_brute_force_optimum_of_small_problems():
    for seed in range(3):
        evaluator = ToyEvaluator(3, seed, noise=0.0)
        problem = evaluator.problem()
        optimum, score = evaluator.optimum(problem.space, problem.budget)
        *_, history = search(begun("nsga2", problem, ONE_RUNG), evaluator, 6)
        assert history.best(900).configuration == optimum
        assert history.best(900).score == pytest.approx(score)


def test_guided_search_beats_random_search():
    assert min(gain("nsga2", seed, over="random") for seed in range(3)) > 0


def test_warm_start_leads_from_the_first_generation():
    for seed in range(3):
        cold = best_score("nsga2", seed, generations=1, warm_start=False)
        assert best_score("nsga2", seed, generations=1) > cold


def test_measured_baselines_join_the_population():
    evaluator = ToyEvaluator(6)
    problem = evaluator.problem()
    baselines = measured_uniforms(evaluator, problem)
    searcher = begun("nsga2", problem)
    searcher.ask(History(baselines), np.random.default_rng(0))
    members = {member["configuration"] for member in searcher.state()["population"]}
    assert members == {str(e.configuration) for e in baselines}


def test_population_is_no_larger_than_asked():
    evaluator = ToyEvaluator(8)
    searcher = begun("nsga2", evaluator.problem(), ONE_RUNG, population=7, offspring=12)
    for _ in search(searcher, evaluator, 3):
        assert len(searcher.state()["population"]) == 7


@pytest.mark.parametrize("options", [{"population": 1}, {"offspring": 0}, {"epsilon": 0.0}])
def test_senseless_options_are_refused(options):
    with pytest.raises(ConfigurationError):
        searchers.create("nsga2", **options)


def test_crossover_gets_mates_from_the_population():
    evaluator = ToyEvaluator(8)
    searcher = searchers.create("nsga2", population=10, offspring=10, model_share=0.0)
    searcher.begin(proposer_of(evaluator.problem(), "crossover_uniform", "crossover_block"), ONE_RUNG)
    (history,) = search(searcher, evaluator, 1)
    digests = {evaluation.configuration.digest for evaluation in history}
    candidates = searcher.ask(history, np.random.default_rng(1))
    crossed = [candidate for candidate in candidates if candidate.origin.startswith("crossover")]
    assert len(crossed) > 5
    assert all(len(candidate.parents) >= 2 and set(candidate.parents) <= digests for candidate in crossed)
