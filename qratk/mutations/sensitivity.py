"""The paper's sensitivity-guided mutation: one atomic edit at a layer drawn by importance (Eq. 9)."""

from __future__ import annotations

import numpy as np

from qratk.core.configuration import Configuration
from qratk.core.edits import DEFAULT_EPSILON, Ledger, weights_of_layers
from qratk.core.problem import Problem
from qratk.mutations._draws import Direction, check_options, draw, draw_column
from qratk.mutations.base import MutationOperator, mutations


@mutations.register("sensitivity")
class SensitivityGuided(MutationOperator):
    """One step of a knob drawn in equal parts, at a layer drawn with Pr ~ (importance + epsilon)^gamma.

    Eq. 9 as printed (`direction="either"`) aims steps down at important layers too. Directed edits go up where
    importance is high and down where it is low, by the inverse weights.

    Args:
        gamma: concentration; 0 would be uniform.
        epsilon: added to the normalised importance (Eq. 9 has none, and so never edits the least important layer).
        direction: "directed" or "either".
    """

    def __init__(self, gamma: float = 1.5, epsilon: float = DEFAULT_EPSILON, direction: Direction = "directed") -> None:
        check_options(gamma, epsilon, direction)
        self.gamma = gamma
        self.epsilon = epsilon
        self.direction = direction

    def mutate(self, problem: Problem, configuration: Configuration, rng: np.random.Generator) -> Configuration:
        """Configuration one atomic edit away; the same one when both ladders have a single rung."""
        ledger = Ledger(problem, configuration)
        weights = weights_of_layers(problem, self.epsilon)
        possible = {direction: ledger.possible(direction) for direction in (-1, 1)}
        column = draw_column(possible[-1] | possible[1], rng)
        if column is None:
            return configuration
        sides = [direction for direction in (-1, 1) if possible[direction][:, column].any()]
        if self.direction == "directed":
            direction = sides[int(rng.integers(len(sides)))]
            layer = draw(weights[:, column] ** (direction * self.gamma) * possible[direction][:, column], rng)
        else:
            either = possible[-1][:, column] | possible[1][:, column]
            layer = draw(weights[:, column] ** self.gamma * either, rng)
            assert layer is not None
            here = [direction for direction in (-1, 1) if possible[direction][layer, column]]
            direction = here[int(rng.integers(len(here)))]
        assert layer is not None
        ledger.step(layer, column, direction)
        return ledger.configuration()
