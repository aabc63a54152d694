"""PriorBand keeps the contract of searchers, and draws with the published weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from qratk_priorband import PriorBand, ladder_probabilities, steps_spent
from scipy.stats import truncnorm

from qratk import REGISTRIES, Configuration, ConfigurationError, GlobalSearcher, History
from qratk.testing import LADDER, SearcherContract, ToyEvaluator, default_proposer, promoted, toy_problem


class TestPriorBandContract(SearcherContract):
    generations = 4  # one bracket of each kind, and one that knows an incumbent

    @pytest.fixture
    def make(self) -> Callable[[], GlobalSearcher]:
        return lambda: PriorBand(offspring=9)


def begun(problem=None, **options) -> PriorBand:
    searcher = PriorBand(**options)
    searcher.begin(default_proposer(problem or toy_problem(6)), LADDER)
    return searcher


def raced(searcher: PriorBand, size: int = 27, seed: int = 0) -> History:
    """What comes of random configurations that race up all rungs."""
    problem, rng = searcher.proposer.problem, np.random.default_rng(seed)
    drawn = REGISTRIES["searchers"].create("random", offspring=size)
    drawn.begin(searcher.proposer, LADDER)
    return History(promoted(ToyEvaluator(problem.num_layers), drawn.ask(History(), rng), LADDER))


@pytest.mark.parametrize(("rungs", "deviation"), [(3, 0.25), (5, 0.4), (1, 0.25)])
def test_prior_is_scipys_truncated_normal_in_equal_parts(rungs: int, deviation: float) -> None:
    table, edges = ladder_probabilities(rungs, deviation), np.linspace(0, 1, rungs + 1)
    for center, row in enumerate(table):
        middle = (edges[center] + edges[center + 1]) / 2
        normal = truncnorm(-middle / deviation, (1 - middle) / deviation, loc=middle, scale=deviation)
        np.testing.assert_allclose(row, np.diff(normal.cdf(edges)), rtol=1e-6)
        assert row.argmax() == center


@pytest.mark.parametrize("rung", [0, 1, 2])
def test_before_there_is_an_incumbent_a_draw_is_random_by_one_in_one_and_eta_to_the_rung(rung: int) -> None:
    searcher = begun()
    incumbent, shares = searcher.shares(History(), searcher.proposer.problem.space.smallest, rung)
    assert incumbent is None
    np.testing.assert_allclose(shares, (1 / (1 + 3**rung), 1 - 1 / (1 + 3**rung), 0.0))


def test_incumbent_and_prior_share_by_the_probabilities_of_the_best_of_the_highest_rung() -> None:
    searcher = begun(offspring=9)
    space, history = searcher.proposer.problem.space, raced(searcher)
    center = space.uniform(4, 8)
    incumbent, (at_random, of_prior, of_incumbent) = searcher.shares(history, center, 1)
    high = sorted(history.at(900), key=lambda e: -e.score)
    assert incumbent == high[0].configuration
    table = ladder_probabilities(3, 0.25)

    def probability(configuration: Configuration, mode: Configuration) -> float:
        return float(np.prod(table[space.indices(mode), space.indices(configuration)]))

    top = high[: max(1, len(high) // 3)]  # three at the highest rung: enough for eta
    weights = np.arange(len(top), 0, -1)
    scores = [sum(w * probability(e.configuration, mode) for w, e in zip(weights, top, strict=True))
              for mode in (center, incumbent)]  # fmt: skip
    assert at_random == pytest.approx(1 / 4)
    assert of_incumbent == pytest.approx(3 / 4 * scores[1] / sum(scores))
    assert at_random + of_prior + of_incumbent == pytest.approx(1.0)


def test_no_incumbent_before_a_whole_bracket_is_spent() -> None:
    searcher, history = begun(offspring=81), raced(begun())
    assert steps_spent(list(history)) < searcher.bracket_cost
    assert searcher.shares(history, searcher.proposer.problem.space.smallest, 1)[0] is None


def test_steps_continued_from_rung_to_rung_are_spent_once() -> None:
    problem = toy_problem(4)
    evaluator, uniform = ToyEvaluator(4), problem.space.uniform(2, 4)
    assert steps_spent([evaluator.measure(uniform, steps) for steps in (100, 300)]) == 300


def test_draws_from_the_prior_keep_near_its_center_and_random_ones_do_not() -> None:
    problem = toy_problem(20, like=(8, 16))
    searcher = begun(problem, center="4:8*20", offspring=200, deviation=0.1)
    searcher.generation = 2  # the bracket that draws nine of ten from the prior
    rng = np.random.default_rng(0)
    candidates = searcher.proposals(History(), rng, size=200, known=())
    assert {c.origin for c in candidates} == {"priorband:prior"}
    center = problem.space.uniform(4, 8)
    distances = [problem.space.atomic_distance(c.configuration, center) for c in candidates]
    assert 0.8 * 200 < len(candidates) < 200
    assert np.mean(distances) < 8  # of 40 knobs; 27 are expected of uniform draws


def test_draws_around_the_incumbent_change_half_of_the_knobs_at_most() -> None:
    problem = toy_problem(40, like=(8, 16))
    searcher = begun(problem)
    mode, rng = problem.space.uniform(4, 8), np.random.default_rng(0)
    start = problem.space.indices(mode)
    changed = [(problem.space.indices(searcher._drawn(mode, 0.5, rng)) != start).mean() for _ in range(50)]
    expected = 0.5 * (1 - ladder_probabilities(3, 0.25)[1, 1])
    assert np.mean(changed) == pytest.approx(expected, abs=0.03)


def test_center_is_a_text_the_largest_uniform_or_what_importance_makes_of_it() -> None:
    problem = toy_problem(8, 2, like=(4, 8))
    uniform, solved = (begun(problem, center=center)._mode for center in ("uniform", "importance"))
    assert uniform == problem.space.uniform(4, 8)
    assert set(solved.ranks) >= {8}
    assert len(set(solved.bits)) > 1
    assert begun(problem, center="2:4*8")._mode == problem.space.uniform(2, 4)
    with pytest.raises(ConfigurationError, match="bits must be one of"):
        begun(problem, center="3:4*8")


@pytest.mark.parametrize("options", [{"deviation": 0.0}, {"mutation_rate": 1.5}])
def test_options_that_make_no_sense_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match="priorband"):
        PriorBand(**options)


def test_it_is_found_by_its_name_and_its_recipe_is_of_it() -> None:
    import yaml

    assert isinstance(REGISTRIES["searchers"].create("priorband", offspring=3), PriorBand)
    recipe = yaml.safe_load((Path(__file__).parents[1] / "priorband.yaml").read_text())
    assert recipe["search"]["searcher"]["class_path"] == "priorband"
