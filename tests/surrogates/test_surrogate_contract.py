from __future__ import annotations

from functools import partial

import pytest

from qratk.surrogates.base import surrogates
from qratk.testing import SurrogateContract

FASTER = {"network": {"starts": 1}, "boosted_trees": {"trees": 10}}


class TestRegisteredSurrogates(SurrogateContract):
    @pytest.fixture(params=surrogates.names())
    def make(self, request):
        return partial(surrogates.create, request.param, **FASTER.get(request.param, {}))
