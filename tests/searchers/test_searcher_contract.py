from __future__ import annotations

from functools import partial

import pytest

from qratk.searchers.base import searchers
from qratk.testing import SearcherContract


class TestRegisteredSearchers(SearcherContract):
    @pytest.fixture(params=searchers.names())
    def make(self, request):
        small = {option.name for option in searchers.options(request.param)} & {"offspring"}
        return partial(searchers.create, request.param, **dict.fromkeys(small, 8))


class TestNSGA2WithoutWarmStart(SearcherContract):
    @pytest.fixture
    def make(self):
        return partial(searchers.create, "nsga2", warm_start=False, population=5, offspring=4)
