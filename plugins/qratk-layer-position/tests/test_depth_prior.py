"""The estimator keeps the contract and has the shape that it promises."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
from qratk_layer_position import DepthPrior

from qratk import REGISTRIES, ConfigurationError
from qratk.testing import EstimatorContract


class TestDepthPriorContract(EstimatorContract):
    @pytest.fixture
    def make(self) -> Callable[[], DepthPrior]:
        return DepthPrior


def scores(num_layers: int, **options: float) -> np.ndarray:
    module = SimpleNamespace(backbone=SimpleNamespace(layers=(None,) * num_layers))
    return DepthPrior(**options).estimate(module, [], lowest_bits=2)


def test_five_layers_score_as_worked_out_by_hand() -> None:
    np.testing.assert_allclose(scores(5, first=1.0, last=3.0, middle=0.2, power=2.0), [1.0, 0.4, 0.2, 0.9, 3.0])


def test_equal_edges_are_symmetric_and_lowest_in_the_middle() -> None:
    found = scores(12)
    np.testing.assert_allclose(found, found[::-1])
    assert (np.diff(found[:6]) < 0).all()


def test_a_single_layer_scores_the_larger_edge() -> None:
    np.testing.assert_array_equal(scores(1, first=0.5, last=2.0), [2.0])


@pytest.mark.parametrize("options", [{"first": -1.0}, {"middle": -0.1}, {"power": 0.0}])
def test_options_that_make_no_sense_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match="depth_prior"):
        DepthPrior(**options)


def test_it_is_found_by_its_name() -> None:
    assert isinstance(REGISTRIES["estimators"].create("depth_prior", power=1.0), DepthPrior)
