"""One comparison for all tests of its report."""

from __future__ import annotations

import pytest
from example_comparison import compare


@pytest.fixture(scope="session")
def comparison(tmp_path_factory):
    """A finished comparison of six recipes with two seeds, and one failed cell."""
    return compare(tmp_path_factory.mktemp("comparison") / "runs")
