"""Commands over the same small models."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def _traced_once(traced_once: None) -> None:
    """The embedded model need not be traced by every command."""
