"""All the steps down that a configuration has, as arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qratk.core.configuration import KNOBS, Configuration
from qratk.core.edits import Ledger, weights_of_layers
from qratk.core.errors import InfeasibleBudgetError
from qratk.core.problem import Problem


@dataclass(frozen=True)
class StepsDown:
    """Every step down from a configuration, (n,), chain by chain and each chain from the top.

    A chain is one knob of one layer: its steps can only be taken in order. `order` is a step's place in its chain.
    """

    layer: NDArray[np.int64]
    column: NDArray[np.int64]
    order: NDArray[np.int64]
    importance: NDArray[np.float64]
    saved_bytes: NDArray[np.int64]
    saved_bits: NDArray[np.int64]

    @classmethod
    def of(cls, problem: Problem, indices: NDArray[np.int64], epsilon: float) -> StepsDown:
        """Steps from the given rung indices (L, 2)."""
        counts = indices.ravel()  # chains in the order layer 0 bits, layer 0 rank, layer 1 bits, ...
        chain = np.repeat(np.arange(counts.size), counts)
        order = np.arange(chain.size) - np.repeat(np.cumsum(counts) - counts, counts)
        layer, column = np.divmod(chain, 2)
        rung = counts[chain] - order
        saved = np.zeros(chain.size, dtype=np.int64)
        for c, knob in enumerate(KNOBS):
            table, here = problem.table(knob), column == c
            saved[here] = table[layer[here], rung[here]] - table[layer[here], rung[here] - 1]
        bits, parameters = np.asarray(problem.space.bits), np.asarray(problem.memory.parameters)
        is_bits = column == 0
        saved_bits = np.zeros(chain.size, dtype=np.int64)
        saved_bits[is_bits] = parameters[layer[is_bits]] * (bits[rung[is_bits]] - bits[rung[is_bits] - 1])
        return cls(layer, column, order, weights_of_layers(problem, epsilon)[layer, column], saved, saved_bits)


def lowered(ledger: Ledger, steps: StepsDown, taken: NDArray[np.bool_] | NDArray[np.int64]) -> Configuration:
    """The ledger's configuration with the given steps taken, by mask or by index."""
    indices = ledger.indices.copy()
    np.subtract.at(indices, (steps.layer[taken], steps.column[taken]), 1)
    return ledger.problem.space.from_indices(indices, ledger.shared)


def smallest_or_raise(problem: Problem, configuration: Configuration) -> Configuration:
    """The smallest configuration at the same settings, for ladders on which a lower rung can be larger.

    Raises `InfeasibleBudgetError` when it does not fit.
    """
    problem.budget.check(problem.memory)
    smallest = problem.space.smallest.with_shared(configuration.shared)
    if not problem.feasible(smallest):  # `check` raises first; kept for a budget that overrides it
        raise InfeasibleBudgetError(f"no downgrade of {configuration} fits the budget")
    return smallest
