from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from searcher_toys import LADDER, begun

from qratk.core import Configuration, ConfigurationError, History
from qratk.testing import toy_problem

fixed = partial(begun, "fixed", toy_problem(4, like=(4, 16)))


def test_written_configurations_are_proposed_once_at_the_highest_rung():
    searcher = fixed(configurations=["4:8*4", "4:16 2:4*3", "4:8*4"])
    candidates = searcher.ask(History(), np.random.default_rng(0))
    assert [str(c.configuration) for c in candidates] == ["4:8*4", "4:16 2:4*3"]
    assert searcher.schedule(LADDER, 2, 3) == ((900, 2),)
    assert searcher.finished
    assert searcher.ask(History(), np.random.default_rng(0)) == ()


def test_first_pattern_that_matches_a_layer_decides():
    searcher = fixed(patterns={r"layers\.[01]$": [4, 16], ".": [2, 4]})
    (candidate,) = searcher.ask(History(), np.random.default_rng(0))
    assert candidate.configuration == Configuration.from_text("4:16*2 2:4*2")


@pytest.mark.parametrize("like", [(4, 4), (2, 16), (2, 8)])
def test_largest_rank_is_the_highest_at_which_the_budget_holds(like):
    problem = toy_problem(4, like=like)
    searcher = begun("fixed", problem, patterns={r"layers\.[01]$": [2, "largest"], ".": [2, 4]})
    (candidate,) = searcher.ask(History(), np.random.default_rng(0))
    found = candidate.configuration
    assert found.bits == (2,) * 4
    assert found.ranks[2:] == (4, 4)
    fitting = [r for r in problem.space.ranks if problem.feasible(Configuration.of([2] * 4, [r, r, 4, 4]))]
    assert found.ranks[:2] == (max(fitting),) * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give configurations"),
        ({"configurations": ["8:16*4"]}, "over the budget"),
        ({"configurations": ["3:16*4"]}, "bits must be one of"),
        ({"configurations": ["4:16*3"]}, "configuration of 4 layers is needed"),
        ({"patterns": {"layers": [4, 8], "head": [8, 8]}}, "'head' matches no layer"),
        ({"patterns": {".": [8, "largest"]}}, "over the budget"),
        ({"patterns": {".": [4]}}, r"\[bits, rank\]"),
        ({"patterns": {".": [4, "most"]}}, r"\[4, largest\]"),
        ({"patterns": {"layers.0": [4, 8]}}, "no pattern matches the layer 'layers.1'"),
    ],
)
def test_what_cannot_be_proposed_is_named(options, message):
    with pytest.raises(ConfigurationError, match=message):
        fixed(**options)
