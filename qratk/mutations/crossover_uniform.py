"""Uniform crossover: every layer's choice from one of two parents (Syswerda 1989)."""

from __future__ import annotations

import numpy as np

from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError
from qratk.core.problem import Problem
from qratk.mutations._draws import mixed
from qratk.mutations.base import CrossoverOperator, mutations


@mutations.register("crossover_uniform")
class UniformCrossover(CrossoverOperator):
    """Takes each layer's bits and rank together from the mate with probability `share`, else from the first parent.

    Args:
        share: probability that a layer comes from the mate.
    """

    def __init__(self, share: float = 0.5) -> None:
        if not 0 < share < 1:
            raise ConfigurationError(f"share must lie between 0 and 1, got {share}")
        self.share = share

    def cross(
        self, problem: Problem, first: Configuration, second: Configuration, rng: np.random.Generator
    ) -> Configuration:
        """Child that mixes its parents layer by layer, and setting by setting."""
        from_mate = rng.random(problem.num_layers) < self.share
        pairs = zip(first.layers, second.layers, from_mate.tolist(), strict=True)
        layers = tuple(theirs if swapped else ours for ours, theirs, swapped in pairs)
        return Configuration(layers, mixed(first.shared, second.shared, self.share, rng))
