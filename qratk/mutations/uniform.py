"""The control without guidance: any atomic edit, all equally likely."""

from __future__ import annotations

import numpy as np

from qratk.core.configuration import Configuration
from qratk.core.edits import Ledger
from qratk.core.problem import Problem
from qratk.mutations.base import MutationOperator, mutations


@mutations.register("uniform")
class UniformEdit(MutationOperator):
    """One atomic edit drawn uniformly from all layers, knobs and directions that stay on the ladders."""

    def mutate(self, problem: Problem, configuration: Configuration, rng: np.random.Generator) -> Configuration:
        """Configuration one atomic edit away; the same one when both ladders have a single rung."""
        ledger = Ledger(problem, configuration)
        edits = np.argwhere(np.stack([ledger.possible(-1), ledger.possible(1)]))  # rows: direction, layer, column
        if not len(edits):
            return configuration
        side, layer, column = (int(i) for i in edits[int(rng.integers(len(edits)))])
        ledger.step(layer, column, 2 * side - 1)
        return ledger.configuration()
