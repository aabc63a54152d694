from __future__ import annotations

from functools import partial

import pytest

from qratk.searchers.base import searchers
from qratk.testing import CASES, SearcherContract, toy_problem

# Plugins test their own; two have a suite below, and "fixed" proposes what it is told, whatever the problem.
ONCE = ("amq", "decoupled", "fixed")
OWN = [name for name in searchers.names() if searchers.owner(name) == "qratk" and name not in ONCE]


class TestRegisteredSearchers(SearcherContract):
    @pytest.fixture(params=OWN)
    def make(self, request):
        small = {option.name for option in searchers.options(request.param)} & {"offspring"}
        return partial(searchers.create, request.param, **dict.fromkeys(small, 8))


class OptionsContract(SearcherContract):
    """For other options of a searcher that keeps the whole contract already: problems that its parts differ on."""

    @pytest.fixture(params=["one layer", "rank 0 and 16 bits", "capped and budgeted", "four shared settings"])
    def problem(self, request):
        return toy_problem(**{"num_layers": 4, **CASES[request.param]})


class TestNSGA2WithoutWarmStart(OptionsContract):
    @pytest.fixture
    def make(self):
        return partial(searchers.create, "nsga2", warm_start=False, population=5, offspring=4)


class TestAgeingEvolutionWithAShortQueue(OptionsContract):
    @pytest.fixture
    def make(self):
        return partial(searchers.create, "ageing_evolution", warm_start=False, population=3, sample=2, offspring=4)


class TestSearchersThatAskOnce(SearcherContract):
    @pytest.fixture(params=["amq", "decoupled"])
    def make(self, request):
        small = {"initial": 8, "iterations": 1, "population": 10, "generations": 2} if request.param == "amq" else {}
        return partial(searchers.create, request.param, **small)

    def test_tiny_space_is_exhausted_and_ends(self, make):
        """It proposes a few configurations and no more, whatever the size of the space."""
        searcher = make()
        found = list(self._search(searcher, toy_problem(1, like=(8, 8))))
        assert len(found) == 1
        assert searcher.finished
