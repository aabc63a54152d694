from __future__ import annotations

from functools import partial

import pytest

from qratk.mutations.base import CrossoverOperator, mutations
from qratk.testing import CrossoverContract, MutationContract

CROSSOVERS = [name for name in mutations.names() if isinstance(mutations.create(name), CrossoverOperator)]


class TestRegisteredMutations(MutationContract):
    @pytest.fixture(params=[name for name in mutations.names() if name not in CROSSOVERS])
    def make(self, request):
        return partial(mutations.create, request.param)


class TestSensitivityInEitherDirection(MutationContract):
    @pytest.fixture
    def make(self):
        return partial(mutations.create, "sensitivity", direction="either")


class TestRegisteredCrossovers(CrossoverContract):
    @pytest.fixture(params=CROSSOVERS)
    def make(self, request):
        return partial(mutations.create, request.param)


class TestCrossoverThatSeldomTakesFromTheMate(CrossoverContract):
    @pytest.fixture
    def make(self):
        return partial(mutations.create, "crossover_uniform", share=0.2)


def test_both_crossovers_are_registered_as_crossovers():
    assert {"crossover_block", "crossover_uniform"} <= set(CROSSOVERS)
