"""Level switch: one step up, and steps down of the same knob elsewhere that pay for it (Sieberling et al. 2024)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qratk.core.configuration import KNOBS, Configuration
from qratk.core.edits import DEFAULT_EPSILON, Ledger, weights_of_layers
from qratk.core.errors import ConfigurationError
from qratk.core.problem import Problem
from qratk.mutations._draws import check_options, draw, draw_column
from qratk.mutations.base import MutationOperator, mutations


@mutations.register("swap")
class LevelSwitch(MutationOperator):
    """One step up, drawn as in Eq. 9, and the steps down of the same knob whose bytes come nearest to it from above.

    EvoPress (Sieberling et al. 2024, section 3) switches levels among units of one size only, so that
    the bytes stay exactly equal. Here layers may differ in size: a single step that pays for the whole is preferred,
    the smallest that does; where none does, several are taken. Steps down are drawn by the inverse weights of Eq. 9.
    Bytes never grow, and a configuration within the budget stays in it.

    Args:
        gamma: concentration of both draws.
        epsilon: added to the normalised importance.
        tolerance: a step that saves up to this share more than the smallest that pays counts as equally near.
    """

    def __init__(self, gamma: float = 1.5, epsilon: float = DEFAULT_EPSILON, tolerance: float = 0.05) -> None:
        check_options(gamma, epsilon, "directed")
        if not tolerance >= 0:
            raise ConfigurationError(f"tolerance must not be negative, got {tolerance}")
        self.gamma = gamma
        self.epsilon = epsilon
        self.tolerance = tolerance

    def mutate(self, problem: Problem, configuration: Configuration, rng: np.random.Generator) -> Configuration:
        """Configuration of no more bytes, one knob of one layer higher; the same one when nothing can be switched."""
        ledger = Ledger(problem, configuration)
        start = (ledger.bytes, ledger.weighted_bits)
        affordable = _affordable(ledger)
        column = draw_column(affordable, rng)
        if column is None:
            return configuration
        weights = weights_of_layers(problem, self.epsilon)[:, column]
        up = draw(weights**self.gamma * affordable[:, column], rng)
        assert up is not None
        ledger.step(up, column, 1)
        paid = self._pay(ledger, start, weights, (up, column), rng)
        return ledger.configuration() if paid else configuration

    def _pay(
        self,
        ledger: Ledger,
        start: tuple[int, int],
        weights: NDArray[np.float64],
        locked: tuple[int, int],
        rng: np.random.Generator,
    ) -> bool:
        """Step down until neither bytes nor weighted bits are more than at the start; False when that cannot be."""
        layer, column = locked
        while (owed := ledger.bytes - start[0]) > 0 or ledger.weighted_bits > start[1]:
            saved = -ledger.growth(-1)[:, column]
            saved[layer] = 0
            near = self._nearest(saved, max(owed, 1))
            drawn = draw(weights**-self.gamma * near, rng)
            if drawn is None:
                return False
            ledger.step(drawn, column, -1)
        return True

    def _nearest(self, saved: NDArray[np.int64], owed: int) -> NDArray[np.bool_]:
        """Which steps may be taken, (L,): the smallest of those that pay all that is owed, else all that save."""
        enough = saved >= owed
        if not enough.any():
            return np.asarray(saved > 0)
        return np.asarray(enough & (saved <= saved[enough].min() * (1 + self.tolerance)))


def _affordable(ledger: Ledger) -> NDArray[np.bool_]:
    """Steps up, (L, 2), that the other layers could pay for with all their steps down of the same knob."""
    rows = np.arange(len(ledger.indices))
    tables = [ledger.problem.table(knob) for knob in KNOBS]
    reserve = np.stack([t[rows, ledger.indices[:, c]] - t[:, 0] for c, t in enumerate(tables)], axis=1)
    others = reserve.sum(axis=0) - reserve
    return np.asarray(ledger.possible(1) & (ledger.growth(1) <= others) & (others > 0))
