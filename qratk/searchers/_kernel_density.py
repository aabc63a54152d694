"""Density over configurations: a product over knobs of kernel estimates on the ladders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qratk.core.configuration import KNOBS, Configuration
from qratk.core.problem import Problem
from qratk.core.shared import SharedLadder

Array = NDArray[np.float64]


@dataclass(frozen=True)
class LadderDensity:
    """Probability of each rung of each knob, independent between knobs: `tables` are bits (L, rungs), ranks (L, rungs).

    `shared` has that of each value of each shared setting, (values,) each.

    As in TPE (Bergstra et al. 2011, section 4), one uniform prior point is mixed into every knob's estimate.
    """

    tables: tuple[Array, ...]
    shared: tuple[Array, ...] = ()

    @classmethod
    def of(
        cls, problem: Problem, configurations: Sequence[Configuration], bandwidths: tuple[Array, Array]
    ) -> LadderDensity:
        """Estimate from configurations, with one bandwidth in (0, 1) a layer for bits and ranks, each (L,)."""
        space = problem.space
        shape = (len(configurations), space.num_layers, len(KNOBS))
        indices = np.array([space.indices(c) for c in configurations], dtype=np.int64).reshape(shape)
        tables = []
        for column, knob in enumerate(KNOBS):
            kernels = ordinal_kernels(len(space.ladder(knob)), bandwidths[column])  # (L, from, to)
            seen = kernels[np.arange(space.num_layers), indices[:, :, column]]  # (n, L, to)
            rungs = kernels.shape[2]
            tables.append((seen.sum(axis=0) + 1.0 / rungs) / (len(configurations) + 1))
        places = np.array([space.shared_indices(c) for c in configurations]).reshape(len(configurations), -1)
        width = float(min(table.min() for table in bandwidths))  # a setting concerns every layer
        shared = [_setting(ladder, places[:, column], width) for column, ladder in enumerate(space.shared)]
        return cls(tuple(tables), tuple(shared))

    def log_density(self, indices: NDArray[np.int64], shared: NDArray[np.int64]) -> Array:
        """Logarithm of the probability, (n,), of rung indices (n, L, 2) and places of settings (n, S)."""
        rows = np.arange(indices.shape[1])
        parts = [np.log(table[rows, indices[:, :, column]]).sum(axis=1) for column, table in enumerate(self.tables)]
        parts += [np.log(table[shared[:, column]]) for column, table in enumerate(self.shared)]
        return np.asarray(sum(parts), dtype=np.float64)

    def sample(self, size: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Configurations drawn from it as rung indices, (size, L, 2), and places of settings, (size, S)."""
        columns = []
        for table in self.tables:
            draws = rng.random((size, table.shape[0]))
            below = np.cumsum(table, axis=1)[:, :-1]  # without the last: rounding must not lead off the ladder
            columns.append((draws[:, :, None] > below).sum(axis=2))
        places = [(rng.random((size, 1)) > np.cumsum(table)[:-1]).sum(axis=1) for table in self.shared]
        shared = np.stack(places, axis=1) if places else np.zeros((size, 0), dtype=np.int64)
        return np.stack(columns, axis=2), shared


def _setting(ladder: SharedLadder, places: NDArray[np.int64], bandwidth: float) -> Array:
    """Estimate for a setting, (values,): kernels fall with the distance on its ladder, or between names."""
    size = len(ladder.values)
    distance = np.array([[ladder.distance(a, b) for b in range(size)] for a in range(size)])
    kernels = bandwidth**distance
    kernels = kernels / kernels.sum(axis=1, keepdims=True)
    return np.asarray((kernels[places].sum(axis=0) + 1.0 / size) / (len(places) + 1))


def ordinal_kernels(rungs: int, bandwidths: Array) -> Array:
    """Kernel of each layer, (L, from, to): proportional to bandwidth^|distance in rungs|, each row summing to 1.

    The discrete kernel of Wang and van Ryzin (1981), normalised on a finite ladder. A bandwidth near 0 keeps to what
    was seen, near 1 is uniform.
    """
    distance = np.abs(np.subtract.outer(np.arange(rungs), np.arange(rungs)))
    kernels = bandwidths[:, None, None] ** distance
    return np.asarray(kernels / kernels.sum(axis=2, keepdims=True))


def importance_bandwidths(problem: Problem, narrow: float, wide: float) -> tuple[Array, Array]:
    """Bandwidth of each layer for bits and ranks: narrow where the layer matters most, wide where it matters least."""
    shares = (problem.normalised_importance[knob] for knob in KNOBS)
    bits, ranks = (wide + (narrow - wide) * share for share in shares)
    return bits, ranks
