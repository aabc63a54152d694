from __future__ import annotations

from functools import partial

import pytest

from qratk.repairs.base import repairs
from qratk.testing import RepairContract


class TestRegisteredRepairs(RepairContract):
    @pytest.fixture(params=repairs.names())
    def make(self, request):
        return partial(repairs.create, request.param)
