"""Ranks that the budget leaves: as high and as even as they can be, whatever they were."""

from __future__ import annotations

import numpy as np
import pytest

from qratk.core import Configuration, Problem
from qratk.core.evaluation import FidelityLadder, History
from qratk.mutations.base import mutations
from qratk.mutations.proposer import Proposer
from qratk.repairs.fill_ranks import FillRanks
from qratk.searchers.nsga2 import NSGA2
from qratk.testing import toy_problem

FINE = tuple(range(1, 129))


def problem_of(**options: object) -> Problem:
    return toy_problem(**{"num_layers": 12, "ranks": FINE, "like": (4, 8), "seed": 2, **options})


def room(problem: Problem, configuration: Configuration) -> int:
    return problem.budget.limit_bytes - problem.bytes(configuration)


def next_rungs(problem: Problem, configuration: Configuration) -> list[int]:
    """Bytes that one more rung takes of each layer that has one."""
    table, rungs = problem.table("rank"), problem.space.indices(configuration)[:, 1]
    return [int(row[r + 1] - row[r]) for row, r in zip(table, rungs, strict=True) if r + 1 < len(row)]


@pytest.mark.parametrize("ranks", [FINE, (2, 4, 8, 16), (0, 3, 7)])
def test_no_layer_has_room_for_another_rung(ranks: tuple[int, ...]) -> None:
    problem = problem_of(ranks=ranks, limit=None, like=(4, ranks[-2]))
    rng = np.random.default_rng(0)
    for _ in range(30):
        filled = FillRanks().repair(problem, problem.space.random(rng))
        assert 0 <= room(problem, filled) < min(next_rungs(problem, filled), default=2**62)


def test_bits_that_fit_stay_and_what_ranks_were_does_not_matter() -> None:
    problem = problem_of()
    bits = [2, 4] * 6
    fills = {
        FillRanks().repair(problem, Configuration.from_text(" ".join(f"{b}:{rank}" for b in bits)))
        for rank in (1, 7, 100)
    }
    (filled,) = fills
    assert list(filled.bits) == bits
    assert min(filled.ranks) > 8  # what 2 bits save


def test_uniform_bits_at_the_bytes_of_a_uniform_rank_have_that_rank() -> None:
    problem = problem_of()
    assert FillRanks().repair(problem, problem.space.uniform(4, 1)) == problem.space.uniform(4, 8)


def test_ranks_are_even_and_the_rest_goes_to_the_layers_of_most_importance() -> None:
    problem = problem_of(like=(4, 8))
    filled = FillRanks().repair(problem, problem.space.uniform(4, 1).replace(0, bits=2))
    assert max(filled.ranks) - min(filled.ranks) <= 1
    raised = [layer for layer, rank in enumerate(filled.ranks) if rank == max(filled.ranks)]
    assert 0 < len(raised) < 12
    order = np.argsort(-problem.normalised_importance["rank"], kind="stable").tolist()
    assert order[: len(raised)] == sorted(raised, key=order.index)


def test_bits_are_lowered_where_they_fit_at_no_rank() -> None:
    problem = problem_of()
    filled = FillRanks().repair(problem, problem.space.largest)
    assert problem.feasible(filled)
    bits = problem.space.uniform(8, 1).bits
    assert all(after <= before for after, before in zip(filled.bits, bits, strict=True))
    assert max(filled.bits) == 8
    assert problem.violation(problem.space.uniform(8, 1)) > 0


def test_a_search_that_fills_proposes_no_bits_twice_and_leaves_no_room() -> None:
    problem = problem_of(ranks=(2, 8, 16, 32))
    operators = tuple(mutations.create(name) for name in ("sensitivity", "coupled"))
    searcher, history, rng = NSGA2(population=8, offspring=10), History(), np.random.default_rng(0)
    searcher.begin(Proposer(problem, operators, FillRanks()), FidelityLadder((1,)))
    found = searcher.ask(history, rng)
    proposed = [c.configuration for c in found if c.origin != "uniform"]
    assert len(proposed) > 5
    assert len({c.bits for c in proposed}) == len(proposed)
    assert all(room(problem, c) < min(next_rungs(problem, c), default=2**62) for c in proposed)
