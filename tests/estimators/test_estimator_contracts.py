"""Every registered estimator keeps its contract."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from qratk.estimators.base import ImportanceEstimator, estimators
from qratk.testing import EstimatorContract


def created(name: str) -> ImportanceEstimator:
    """An estimator; of few samples where it draws any."""
    few = {option.name for option in estimators.options(name)} & {"samples"}
    return estimators.create(name, **dict.fromkeys(few, 2))


class TestBuiltInEstimators(EstimatorContract):
    @pytest.fixture(params=estimators.names())
    def make(self, request: pytest.FixtureRequest) -> Callable[[], ImportanceEstimator]:
        return lambda: created(request.param)


@pytest.mark.parametrize(
    "name", ["activation_error", "fisher_residual", "gradient_norm", "gradient_spectrum", "hessian_trace"]
)
def test_scores_do_not_depend_on_gradient_checkpointing(name: str) -> None:
    from qratk.testing._torch_contracts import tiny_batches, tiny_module

    module = tiny_module()
    plain = created(name).estimate(module, tiny_batches(), lowest_bits=4)
    module.backbone.enable_gradient_checkpointing()
    module.backbone.model.train()
    np.testing.assert_allclose(created(name).estimate(module, tiny_batches(), lowest_bits=4), plain)
