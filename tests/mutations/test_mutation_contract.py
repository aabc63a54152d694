from __future__ import annotations

from functools import partial

import pytest

from qratk.mutations.base import mutations
from qratk.testing import MutationContract


class TestRegisteredMutations(MutationContract):
    @pytest.fixture(params=mutations.names())
    def make(self, request):
        return partial(mutations.create, request.param)


class TestSensitivityInEitherDirection(MutationContract):
    @pytest.fixture
    def make(self):
        return partial(mutations.create, "sensitivity", direction="either")
