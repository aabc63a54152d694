from __future__ import annotations

from functools import partial

import pytest

from qratk.searchers.base import searchers
from qratk.testing import SearcherContract


class TestRegisteredSearchers(SearcherContract):
    @pytest.fixture(params=searchers.names())
    def make(self, request):
        return partial(searchers.create, request.param)


class TestNSGA2WithoutWarmStart(SearcherContract):
    @pytest.fixture
    def make(self):
        return partial(searchers.create, "nsga2", warm_start=False, population=6, offspring=5)
