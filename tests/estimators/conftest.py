"""The tiny models of the estimators' tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from estimator_models import Models

# What warns when it is imported (see tests/conftest.py) must wait until pytest is configured: hence inside.


@pytest.fixture(params=["llama", "gpt2"])
def models(request: pytest.FixtureRequest) -> Models:
    import estimator_models as toys

    return toys.models(toys.FAMILIES[request.param])


@pytest.fixture
def llama() -> Models:
    import estimator_models as toys

    return toys.models(toys.llama)
