"""Trainings over the same tiny models."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def _traced_once(traced_once: None) -> None:
    """Tracing would take half the time of these tests."""
