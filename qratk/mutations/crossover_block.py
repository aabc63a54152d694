"""Block crossover: a run of neighbouring layers from the mate (two-point crossover)."""

from __future__ import annotations

import numpy as np

from qratk.core.configuration import Configuration
from qratk.core.problem import Problem
from qratk.mutations._draws import mixed
from qratk.mutations.base import CrossoverOperator, mutations


@mutations.register("crossover_block")
class BlockCrossover(CrossoverOperator):
    """Takes a contiguous run of layers from the mate: what neighbouring layers do together stays together.

    Two-point crossover on a ring (Goldberg 1989, section 4): a run that goes past the last layer goes on at the first,
    the first parent's part is then the contiguous one. Every layer is as likely to be exchanged as any other.
    """

    def cross(
        self, problem: Problem, first: Configuration, second: Configuration, rng: np.random.Generator
    ) -> Configuration:
        """Child with 1 to L - 1 layers of the mate, all where there is one, and each setting of either parent."""
        size = problem.num_layers
        start, length = int(rng.integers(size)), int(rng.integers(1, max(2, size)))
        swapped = {(start + i) % size for i in range(length)}
        pairs = enumerate(zip(first.layers, second.layers, strict=True))
        layers = tuple(theirs if layer in swapped else ours for layer, (ours, theirs) in pairs)
        return Configuration(layers, mixed(first.shared, second.shared, 0.5, rng))
