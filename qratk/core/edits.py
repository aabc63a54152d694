"""Single-step edits of a configuration, priced in bytes for all layers at once (Eq. 7)."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from qratk.core.configuration import KNOBS, Configuration
from qratk.core.problem import Problem

DEFAULT_EPSILON: Final = 0.1
"""Added to normalised importance wherever Eq. 6, 8 and 9 use it, so that no layer is ever out of reach."""


class Ledger:
    """A configuration as rung indices (L, 2), with its bytes kept current while single steps are taken.

    Columns are knobs in the order of `KNOBS`: bits, rank. A step down leads to the nearest lower rung; the packing of
    a quantiser may make a lower rung larger (3 bits in words of 32, on odd shapes), so savings may be negative. The
    shared settings of the configuration stay as they are.
    """

    def __init__(self, problem: Problem, configuration: Configuration) -> None:
        self.problem = problem
        self.indices = problem.space.indices(configuration)
        self.shared = configuration.shared
        self._tables = tuple(problem.table(knob) for knob in KNOBS)  # each (L, rungs)
        self._parameters = np.asarray(problem.memory.parameters, dtype=np.int64)
        self._bits = np.asarray(problem.space.bits, dtype=np.int64)
        self._rows = np.arange(problem.num_layers)
        entries = (table[self._rows, self.indices[:, c]].sum() for c, table in enumerate(self._tables))
        self.bytes = problem.memory.constant_bytes(problem.budget.scope) + int(sum(entries))
        self.weighted_bits = int((self._parameters * self._bits[self.indices[:, 0]]).sum())

    @property
    def excess_bytes(self) -> int:
        """Bytes over the budget; negative when there is room."""
        return self.bytes - self.problem.budget.limit_bytes

    @property
    def excess_weighted_bits(self) -> float:
        """Bits over the cap on the average, summed over weights; not positive when it holds or there is none."""
        cap = self.problem.budget.max_average_bits
        if cap is None:
            return 0.0
        # The same tolerance as in `Budget.violation`, so that both agree on what fits.
        return self.weighted_bits - float(self._parameters.sum()) * cap * (1 + 1e-12)

    @property
    def fits(self) -> bool:
        """Whether the budget holds."""
        return self.excess_bytes <= 0 and self.excess_weighted_bits <= 0

    def possible(self, direction: int) -> NDArray[np.bool_]:
        """Where a step in a direction stays on the ladder, (L, 2)."""
        if direction < 0:
            return self.indices > 0
        return self.indices < np.array([table.shape[1] - 1 for table in self._tables])

    def growth(self, direction: int) -> NDArray[np.int64]:
        """Bytes that one step in a direction adds (negative: saves), (L, 2); 0 at the end of the ladder."""
        added = np.zeros_like(self.indices)
        for column, table in enumerate(self._tables):
            here = self.indices[:, column]
            there = np.clip(here + direction, 0, table.shape[1] - 1)
            added[:, column] = table[self._rows, there] - table[self._rows, here]
        return added

    def relief(self) -> tuple[NDArray[np.float64], float]:
        """What each step down takes off the limit that is exceeded, (L, 2), and by how much it is exceeded.

        The cap on the average bits goes first: only bit steps relieve it, and they save bytes as well. Units are
        weights times bits for the cap and bytes for the budget.
        """
        over_bits = self.excess_weighted_bits
        if over_bits <= 0:
            return -self.growth(-1).astype(np.float64), float(self.excess_bytes)
        saved = np.zeros(self.indices.shape)
        here = self.indices[:, 0]
        saved[:, 0] = self._parameters * (self._bits[here] - self._bits[np.maximum(here - 1, 0)])
        return saved, over_bits

    def step(self, layer: int, column: int, direction: int) -> None:
        """Take one step; the caller sees to it that it stays on the ladder."""
        table = self._tables[column]
        old = int(self.indices[layer, column])
        new = old + direction
        self.bytes += int(table[layer, new] - table[layer, old])
        if column == 0:
            self.weighted_bits += int(self._parameters[layer] * (self._bits[new] - self._bits[old]))
        self.indices[layer, column] = new

    def step_bytes(self, layer: int, column: int, direction: int) -> int:
        """Bytes that one step adds."""
        table = self._tables[column]
        old = int(self.indices[layer, column])
        return int(table[layer, old + direction] - table[layer, old])

    def rungs(self, column: int) -> int:
        """Length of a ladder."""
        return int(self._tables[column].shape[1])

    def configuration(self) -> Configuration:
        """The configuration as it now stands."""
        return self.problem.space.from_indices(self.indices, self.shared)


def weights_of_layers(problem: Problem, epsilon: float) -> NDArray[np.float64]:
    """Normalised importance plus epsilon, (L, 2): the numerators of Eq. 8 and 9."""
    columns = [problem.normalised_importance[knob] for knob in KNOBS]
    return np.stack(columns, axis=1) + epsilon
