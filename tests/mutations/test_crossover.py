from __future__ import annotations

import numpy as np
import pytest

from qratk.core.errors import ConfigurationError
from qratk.mutations.crossover_block import BlockCrossover
from qratk.mutations.crossover_uniform import UniformCrossover
from qratk.testing import toy_problem


def from_mate(operator, num_layers: int, draws: int = 2000) -> np.ndarray:
    """Which layers of the child came from the mate, (draws, L)."""
    problem, rng = toy_problem(num_layers), np.random.default_rng(0)
    first, second = problem.space.smallest, problem.space.largest
    children = [operator.cross(problem, first, second, rng) for _ in range(draws)]
    return np.array([[a == b for a, b in zip(c.layers, second.layers, strict=True)] for c in children])


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_uniform_takes_each_layer_from_the_mate_with_the_given_probability(share):
    taken = from_mate(UniformCrossover(share), 6)
    np.testing.assert_allclose(taken.mean(axis=0), share, atol=0.05)
    correlation = np.corrcoef(taken.T) - np.eye(6)
    assert np.abs(correlation).max() < 0.1  # layers are drawn independently


def test_block_takes_one_run_on_the_ring_of_layers():
    taken = from_mate(BlockCrossover(), 6)
    ends = (taken != np.roll(taken, 1, axis=1)).sum(axis=1)
    assert set(ends.tolist()) == {2}


def test_block_takes_every_layer_and_every_length_equally_often():
    taken = from_mate(BlockCrossover(), 6, 6000)
    np.testing.assert_allclose(taken.mean(axis=0), 0.5, atol=0.04)
    lengths = np.bincount(taken.sum(axis=1), minlength=7)
    assert lengths[[0, 6]].tolist() == [0, 0]
    np.testing.assert_allclose(lengths[1:6] / 6000, 0.2, atol=0.03)


@pytest.mark.parametrize("share", [0.0, 1.0, float("nan")])
def test_share_that_makes_no_mixture_is_refused(share):
    with pytest.raises(ConfigurationError, match="share"):
        UniformCrossover(share)
