from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from searcher_toys import begun

from qratk.core import Configuration, ConfigurationError, History
from qratk.programs.integer import bits_then_ranks, rounding_error
from qratk.searchers._predicted_front import RadialBasis, predicted_front
from qratk.testing import toy_problem

# Without a model the estimated error of rounding is searched: its least is known by an integer program.


def error_of(problem, configuration):
    table, bits = rounding_error(problem), problem.space.bits
    return sum(table[layer, bits.index(b)] for layer, b in enumerate(configuration.bits))


@pytest.mark.parametrize("like", [(4, 8), (4, 16)])
def test_for_every_rank_that_fits_the_error_is_near_the_least(like):
    problem = toy_problem(10, like=like)
    candidates = begun("amq", problem).ask(History(), np.random.default_rng(0))
    assert [c.origin for c in candidates] == ["amq:16", "amq:8", "amq:4"]
    for candidate, rank in zip(candidates, (16, 8, 4), strict=True):
        found = candidate.configuration
        assert problem.feasible(found)
        assert set(found.ranks) == {rank}
        least = error_of(problem, bits_then_ranks(problem, rank, raise_ranks=False))
        assert error_of(problem, found) <= 1.1 * least


def test_what_was_learnt_is_better_than_what_the_predictor_began_with():
    problem = toy_problem(20, 1, like=(4, 8))
    first, last = (
        begun("amq", problem, iterations=n).ask(History(), np.random.default_rng(0))[0].configuration for n in (0, 8)
    )
    assert error_of(problem, last) < error_of(problem, first)


def test_layers_far_more_sensitive_than_the_median_are_kept_off_the_lowest_bits():
    problem = toy_problem(12, 2, like=(2, 16))  # some room over 2 bits
    searcher = begun("amq", problem)
    single = [1.0] * 11 + [2.1]
    roomy = toy_problem(12, 2, like=(4, 16))
    assert [list(places) for places in searcher._allowed(roomy, single)] == [[0, 1, 2]] * 11 + [[1, 2]]
    tight = toy_problem(12, 2, like=(2, 4))  # no room for any
    assert [list(places) for places in searcher._allowed(tight, single)] == [[0, 1, 2]] * 12


def test_measured_divergences_are_decided_once_and_a_resumed_search_measures_none():
    problem, decisions = toy_problem(6), {}
    context = SimpleNamespace(module=None, datamodule=None)

    def ask(decided):
        searcher = begun("amq", problem, iterations=3)
        context.decided = decided
        searcher.attach(context)
        return searcher.ask(History(), np.random.default_rng(5))

    first = ask(lambda key, decide: decisions.setdefault(key, decide()))
    assert list(decisions) == ["amq/sensitivity", "amq/initial", "amq/1", "amq/2", "amq/3"]
    assert all(isinstance(bits, list) and isinstance(value, float) for bits, value in decisions["amq/2"])
    assert ask(lambda key, decide: decisions[key]) == first


def test_a_landscape_is_searched_although_the_command_has_a_model_of_its_own():
    problem = toy_problem(6)
    module = SimpleNamespace(
        backbone=SimpleNamespace(shapes=[SimpleNamespace(name=f"model.layers.{n}") for n in range(6)])
    )
    context = SimpleNamespace(module=module, datamodule=object(), decided=lambda key, decide: decide())
    searcher = begun("amq", problem, iterations=1)
    searcher.attach(context)
    alone = begun("amq", problem, iterations=1)
    found, expected = (one.ask(History(), np.random.default_rng(0)) for one in (searcher, alone))
    assert found == expected


def test_cap_on_the_average_bits_holds():
    problem = toy_problem(8, like=(8, 16), max_average_bits=3.5)
    for candidate in begun("amq", problem).ask(History(), np.random.default_rng(0)):
        assert problem.feasible(candidate.configuration)


@pytest.mark.parametrize("options", [{"population": 1}, {"mutation": 1.5}, {"sensitivity": 0.0}, {"positions": "some"}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        begun("amq", toy_problem(4), **options)


# The predictor, and evolution on it


def test_radial_basis_goes_through_its_points_and_is_exact_for_sums_over_layers():
    rng = np.random.default_rng(0)
    table = rng.random((6, 3))
    line = np.stack([np.zeros(6), table[:, 0], 2 * table[:, 0]], axis=1)  # of each layer a line
    drawn = rng.integers(3, size=(40, 6))
    drawn[:, 5] = 1  # never varies
    points = np.unique(drawn, axis=0)
    values = line[np.arange(6), points].sum(axis=1)
    model = RadialBasis(points, values)
    np.testing.assert_allclose(model(points), values, atol=1e-8)
    others = rng.integers(3, size=(20, 6))
    others[:, 5] = 1
    np.testing.assert_allclose(model(others), line[np.arange(6), others].sum(axis=1), atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_few_points_are_gone_through_too(count):
    points = np.random.default_rng(1).integers(3, size=(count, 8))
    values = np.arange(count, dtype=float)
    np.testing.assert_allclose(RadialBasis(points, values)(points), values, atol=1e-8)


def test_the_front_holds_the_best_for_both_objectives_and_nothing_over_the_limit():
    allowed = [range(3)] * 5
    evolve = partial(predicted_front, population=60, generations=30, crossover=0.9, mutation=0.1)

    def size(rungs):
        total = rungs.sum(axis=1).astype(float)
        return np.where(total <= 6, total, np.inf)

    living = evolve(np.zeros((1, 5), int), lambda rungs: -rungs @ np.arange(1.0, 6.0), size, allowed,
                    np.random.default_rng(0))  # fmt: skip
    fitting = {tuple(row) for row in living.tolist() if sum(row) <= 6}
    assert (0, 0, 0, 0, 0) in fitting
    assert (0, 0, 2, 2, 2) in fitting
    assert len(np.unique(living, axis=0)) == len(living)


def on_model(tmp_path, model_dir, data_files, **options):
    """An open evaluator of a tiny model, its context, and an attached searcher with the problem."""
    from finetune_runs import LADDER, opened
    from lightning import Trainer

    from qratk.core.memory import resolve_budget
    from qratk.core.problem import Importance, Problem
    from qratk.evaluators.base import EvaluationContext

    evaluator = opened(tmp_path, model_dir, data_files)
    memory = evaluator.memory_model(evaluator.space)
    layers = evaluator.space.num_layers
    problem = Problem(evaluator.shapes, memory, resolve_budget(memory, like=(4, 4)), Importance.uniform(layers))
    parts, decisions = evaluator.parts, {}

    def decided(key, decide):
        return decisions.setdefault(key, decide())

    context = EvaluationContext(
        tmp_path, LADDER, 0, parts.module, parts.data, Trainer, say=lambda _: None, decided=decided
    )
    searcher = begun("amq", problem, initial=6, iterations=2, measured=3, **options)
    searcher.attach(context)
    return evaluator, searcher, decisions


def test_on_a_model_the_divergence_of_its_frozen_weights_is_searched(tmp_path, model_dir, data_files):
    import torch

    from qratk.training.divergence import FrozenDivergence

    evaluator, searcher, decisions = on_model(tmp_path, model_dir, data_files, max_positions=50)
    parts = evaluator.parts
    frozen = FrozenDivergence(
        parts.module, parts.device, parts.data.calibration_batches(2, 8), kind="all", most=50, dtype=torch.float32
    )
    parts.preparation.build(evaluator.space)
    frozen.take_targets()
    candidates = searcher.ask(History(), np.random.default_rng(0))
    archive = {tuple(bits): value for pairs in decisions.values() for bits, value in pairs}
    for bits, divergence in archive.items():
        assert divergence == pytest.approx(-frozen.score(Configuration.of(bits, [0] * len(bits))).score, rel=1e-5)
    problem = searcher._problem
    for candidate in candidates:
        ranks = candidate.configuration.ranks
        assert len(set(ranks)) == 1
        fitting = [d for bits, d in archive.items() if problem.feasible(Configuration.of(bits, ranks))]
        assert archive[candidate.configuration.bits] == min(fitting)


def test_without_full_precision_weights_it_says_what_to_do(tmp_path, model_dir, data_files):
    evaluator, searcher, _ = on_model(tmp_path, model_dir, data_files)
    evaluator.parts.preparation.finish(evaluator.space)
    with pytest.raises(ConfigurationError, match="uniform_baselines to false"):
        searcher.ask(History(), np.random.default_rng(0))
