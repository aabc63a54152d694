"""Correlations against scipy's, and where they are not defined."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import rankdata, spearmanr

from qratk.core.correlation import pearson, ranks, spearman


def test_correlations_agree_with_scipy_on_ties():
    rng = np.random.default_rng(0)
    for n in (2, 3, 10, 50):
        a, b = rng.integers(4, size=n).astype(float), rng.normal(size=n)
        np.testing.assert_array_equal(ranks(a), rankdata(a))
        if len(set(a)) > 1:
            assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
            assert pearson(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1])


def test_correlation_of_a_constant_is_not_a_number():
    assert math.isnan(spearman([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]))
    assert math.isnan(spearman([], []))


def test_two_pairs_are_enough_and_one_is_not():
    assert spearman([1, 2], [5, 3]) == pytest.approx(-1.0)
    assert math.isnan(spearman([1], [1]))
