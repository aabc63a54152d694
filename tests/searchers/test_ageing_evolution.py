from __future__ import annotations

import numpy as np
import pytest
from searcher_toys import LADDER, begun, failure, gain, measured_uniforms

from qratk.core import Configuration, Evaluation, History
from qratk.core.errors import ConfigurationError
from qratk.mutations.base import MutationOperator
from qratk.mutations.proposer import Proposer
from qratk.repairs.base import repairs
from qratk.searchers.base import searchers
from qratk.testing import ToyEvaluator, toy_problem


class OneUp(MutationOperator):
    """Raises the rank of a random layer that is not at its highest; says thereby which parent it was given."""

    def mutate(self, problem, configuration, rng):
        layers = [n for n, rank in enumerate(configuration.ranks) if rank < 16]
        if not layers:
            return configuration
        step = problem.space.step(configuration, layers[int(rng.integers(len(layers)))], "rank", 1)
        return step or configuration


def evaluations_of(problem, scores: list[float | None], steps: list[int] | None = None) -> list[Evaluation]:
    """Distinct configurations of rank 4 with the given scores; None for a failure."""
    rng, chosen = np.random.default_rng(0), {}
    while len(chosen) < len(scores):
        bits = rng.choice([2, 4], size=problem.num_layers)
        chosen[Configuration.of(bits.tolist(), [4] * problem.num_layers)] = None
    return [
        failure(problem, c, at) if score is None else Evaluation(c, at, score, problem.footprint(c))
        for c, score, at in zip(chosen, scores, steps or [900] * len(scores), strict=True)
    ]


def told(evaluations, problem, **options):
    """A searcher whose queue is made of the evaluations."""
    searcher = searchers.create("ageing_evolution", warm_start=False, **options)
    searcher.begin(Proposer(problem, [OneUp()], repairs.create("greedy")), LADDER)
    searcher.ask(History(), np.random.default_rng(0))
    searcher.tell(evaluations)
    return searcher


def queue(searcher) -> list[str]:
    return [member["configuration"] for member in searcher.state()["queue"]]


def parents(searcher, evaluations, seed: int = 0) -> list[str]:
    candidates = searcher.ask(History(evaluations), np.random.default_rng(seed))
    return [c.parents[0] for c in candidates if c.parents]


def test_oldest_die_however_good():
    problem = toy_problem(6)
    evaluations = evaluations_of(problem, [9.0, 1.0, 2.0, 3.0, 4.0])
    searcher = told(evaluations, problem, population=3, sample=3, offspring=4)
    assert queue(searcher) == [str(e.configuration) for e in evaluations[2:]]


def test_tournament_over_the_whole_queue_is_won_by_the_best():
    problem = toy_problem(6)
    evaluations = evaluations_of(problem, [1.0, 7.0, 3.0])
    searcher = told(evaluations, problem, population=3, sample=3, offspring=3)
    assert set(parents(searcher, evaluations)) == {evaluations[1].configuration.digest}


def test_higher_rung_wins_a_tournament_and_failures_lose():
    problem = toy_problem(6)
    evaluations = evaluations_of(problem, [None, 7.0, 3.0], [900, 100, 900])
    searcher = told(evaluations, problem, population=3, sample=3, offspring=3)
    assert set(parents(searcher, evaluations)) == {evaluations[2].configuration.digest}


def test_tournament_of_one_draws_parents_uniformly():
    problem = toy_problem(8)
    evaluations = evaluations_of(problem, [1.0, 7.0, 3.0, 5.0])
    searcher = told(evaluations, problem, population=4, sample=1, offspring=8)
    drawn = [parent for seed in range(50) for parent in parents(searcher, evaluations, seed)]
    counts = [drawn.count(e.configuration.digest) for e in evaluations]
    assert min(counts) > 0.15 * len(drawn)


def test_chance_of_the_best_parent_is_that_of_a_draw_without_replacement():
    problem = toy_problem(8)
    evaluations = evaluations_of(problem, [1.0, 7.0, 3.0, 5.0])
    searcher = told(evaluations, problem, population=4, sample=2, offspring=8)
    drawn = [parent for seed in range(60) for parent in parents(searcher, evaluations, seed)]
    share = {e.score: drawn.count(e.configuration.digest) / len(drawn) for e in evaluations}
    assert share[7.0] == pytest.approx(1 / 2, abs=0.08)
    assert share[5.0] == pytest.approx(1 / 3, abs=0.08)
    assert share[1.0] == 0.0


def test_baselines_are_the_oldest_of_the_queue():
    evaluator = ToyEvaluator(6)
    problem, rng = evaluator.problem(), np.random.default_rng(0)
    baselines = measured_uniforms(evaluator, problem)
    reference = evaluator.measure(Configuration.uniform(16, 16, 6), 900)
    searcher = begun("ageing_evolution", problem, population=30, offspring=5)
    candidates = searcher.ask(History([*baselines, reference]), rng)
    searcher.tell([evaluator.measure(c.configuration, 900) for c in candidates])
    assert queue(searcher) == [str(e.configuration) for e in baselines] + [str(c.configuration) for c in candidates]


def test_guided_search_beats_random_search():
    assert min(gain("ageing_evolution", seed, over="random", warm_start=False) for seed in range(3)) > 0


@pytest.mark.parametrize(
    "options", [{"population": 0}, {"offspring": 0}, {"sample": 0}, {"sample": 41}, {"epsilon": 0.0}]
)
def test_senseless_options_are_refused(options):
    with pytest.raises(ConfigurationError):
        searchers.create("ageing_evolution", **options)
