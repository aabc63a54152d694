from __future__ import annotations

import warnings

import numpy as np
import pytest

from qratk.core import (
    Budget,
    Configuration,
    ConfigurationError,
    InfeasibleBudgetError,
    format_bytes,
    parse_bytes,
    resolve_budget,
)
from qratk.core.memory import LayerShape
from qratk.testing import toy_problem


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5.5GiB", 5_905_580_032),
        ("6 GB", 6_000_000_000),
        ("800MB", 800_000_000),
        ("1kib", 1024),
        ("  2 TiB ", 2 * 2**40),
        ("1e3", 1000),
        (".5KB", 500),
        (1234, 1234),
        (2.5e3, 2500),
        ("1.9B", 1),
    ],
)
def test_size_with_unit_is_read(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "5 gigs", "-3MB", "0", "0.4B", "5GiB5", "nan", "1,5GB", "1e400GB", True, None]
)
def test_what_is_no_size_is_refused_with_an_example(text):
    with pytest.raises(ConfigurationError, match=r"size"):
        parse_bytes(text)


@pytest.mark.parametrize("size", [1, 1023, 1024, 10**7, 5_505_000_000])
def test_formatted_size_reads_back_to_four_digits(size):
    assert parse_bytes(format_bytes(size).replace(" ", "")) == pytest.approx(size, rel=1e-3)


def test_bytes_are_a_constant_and_one_term_a_knob():
    problem = toy_problem(6)
    rng = np.random.default_rng(0)
    for scope in ("storage", "training", "serving"):
        tables = {knob: problem.memory.table(scope, knob) for knob in ("bits", "rank")}
        for _ in range(20):
            configuration = problem.space.random(rng)
            indices = problem.space.indices(configuration)
            total = problem.memory.constant_bytes(scope) + sum(
                int(tables[knob][layer, indices[layer, column]])
                for layer in range(6)
                for column, knob in enumerate(("bits", "rank"))
            )
            assert problem.memory.bytes(configuration, scope) == total
            assert problem.memory.footprint(configuration).bytes(scope) == total


def test_adapter_parameters_follow_eq_23():
    shape = LayerShape("layer", (("q", 10, 20), ("v", 10, 5)))
    assert shape.adapter_parameters(4) == 4 * (10 + 20) + 4 * (10 + 5)
    assert shape.parameters == 10 * 20 + 10 * 5


def test_average_bits_weigh_layers_by_their_parameters():
    problem = toy_problem(3, seed=1)
    parameters = np.array(problem.memory.parameters)
    configuration = Configuration.of([2, 4, 8], [4, 4, 4])
    expected = (parameters * [2, 4, 8]).sum() / parameters.sum()
    assert problem.memory.average_bits(configuration) == pytest.approx(expected)


def test_tables_cannot_be_changed_by_those_who_read_them():
    with pytest.raises(ValueError, match="read-only"):
        toy_problem(2).table("bits")[0, 0] = 0


def test_impossible_budget_names_the_smallest_feasible_figure():
    memory = toy_problem(4).memory
    need = memory.bytes(memory.space.smallest)
    with pytest.raises(InfeasibleBudgetError, match=f"{need} bytes"):
        resolve_budget(memory, limit=need - 1)
    assert resolve_budget(memory, limit=need).limit_bytes == need


def test_impossible_cap_on_average_bits_is_said():
    with pytest.raises(InfeasibleBudgetError, match=r"1\.5 average bits"):
        resolve_budget(toy_problem(4).memory, like=(4, 8), max_average_bits=1.5)


def test_budget_that_never_binds_is_told_apart():
    memory = toy_problem(4).memory
    largest = memory.bytes(memory.space.largest)
    assert not Budget(largest).check(memory)
    assert Budget(largest - 1).check(memory)
    assert Budget(largest, max_average_bits=7.9).check(memory)


def test_budget_like_a_uniform_configuration_is_its_bytes():
    memory = toy_problem(4).memory
    budget = resolve_budget(memory, like=(4, 16), scope="training")
    assert budget.limit_bytes == memory.bytes(memory.space.uniform(4, 16), "training")


@pytest.mark.parametrize(
    "statement",
    [{}, {"limit": "1GiB", "like": (4, 16)}, {"like": (5, 16)}, {"like": (4,)}, {"like": (4, 8), "scope": "disk"}],
)
def test_unclear_budget_is_refused(statement):
    with pytest.raises(ConfigurationError):
        resolve_budget(toy_problem(4).memory, **statement)


def test_violation_is_zero_exactly_up_to_the_limit():
    problem = toy_problem(4)
    size = problem.bytes(problem.space.uniform(4, 8))
    uniform = problem.space.uniform(4, 8)
    assert Budget(size).violation(problem.memory, uniform) == 0.0
    assert Budget(size - 1).violation(problem.memory, uniform) == pytest.approx(1 / (size - 1))


def test_configuration_exactly_at_the_cap_fits():
    problem = toy_problem(7, seed=3)
    uniform = problem.space.uniform(4, 8)
    assert Budget(10**12, max_average_bits=4).violation(problem.memory, uniform) == 0.0
    assert Budget(10**12, max_average_bits=3.999).violation(problem.memory, uniform) > 0.0


def test_violation_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        toy_problem(2).violation(toy_problem(2).space.largest)


def test_rank_above_every_matrix_of_a_layer_is_refused():
    from qratk.core.memory import require_ranks

    shapes = [LayerShape("wide", (("q", 96, 96), ("k", 96, 24))), LayerShape("narrow", (("q", 96, 48),))]
    require_ranks(shapes, [0, 48])
    with pytest.raises(ConfigurationError, match="rank 49 is above the matrices of narrow: give ranks of at most 48"):
        require_ranks(shapes, [4, 49])
