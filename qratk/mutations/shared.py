"""One step of one setting that all layers share."""

from __future__ import annotations

from typing import final

import numpy as np

from qratk.core.configuration import Configuration
from qratk.core.problem import Problem
from qratk.mutations.base import MutationOperator, mutations


@final
@mutations.register("shared")
class SharedStep(MutationOperator):
    """One shared setting, drawn in equal parts, a rung up or down, or to another name; all layers stay as they are.

    A search with `shared` ladders has it beside the operators that are given, unless it is among them.
    """

    def applies(self, problem: Problem) -> bool:
        """Whether some setting has more than one value."""
        return any(len(ladder.values) > 1 for ladder in problem.space.shared)

    def mutate(self, problem: Problem, configuration: Configuration, rng: np.random.Generator) -> Configuration:
        """Configuration of which one setting is one edit away; the same one where none has another value."""
        space = problem.space
        places = space.shared_indices(configuration)
        movable = [column for column, ladder in enumerate(space.shared) if len(ladder.values) > 1]
        if not movable:
            return configuration
        column = movable[int(rng.integers(len(movable)))]
        steps = space.shared[column].steps(int(places[column]))
        places[column] = steps[int(rng.integers(len(steps)))]
        return configuration.with_shared(space.shared_at(places))
