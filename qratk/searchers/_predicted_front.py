"""NSGA-II over rungs of bits, on what a radial basis function predicts: the inner search of AMQ (Lee et al. 2025)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Rungs = NDArray[np.int64]
"""Places on the ladder of bits, (n, L)."""


class RadialBasis:
    """Cubic radial basis functions and a linear tail through points, (n, L), and values, (n,).

    Layers that never vary are left out. With no more points than a linear tail needs, or none in general position,
    linear radial basis functions and a constant stand in.
    """

    def __init__(self, points: Rungs, values: Array) -> None:
        from scipy.interpolate import RBFInterpolator

        self._varied = np.ptp(points, axis=0) > 0
        self._scale = max(1, int(points.max()))
        at = self._at(points)
        self._constant = float(values.mean())
        self._model: Callable[[Array], Array] | None = None
        if not self._varied.any():
            return
        tail = np.column_stack([np.ones(len(at)), at])
        general = len(at) > tail.shape[1] and np.linalg.matrix_rank(tail) == tail.shape[1]
        kind = ("cubic", 1) if general else ("linear", 0)
        self._model = RBFInterpolator(at, values, kernel=kind[0], degree=kind[1])

    def __call__(self, points: Rungs) -> Array:
        """Predicted values, (n,)."""
        if self._model is None:
            return np.full(len(points), self._constant)
        return np.asarray(self._model(self._at(points)), dtype=np.float64)

    def _at(self, points: Rungs) -> Array:
        return np.asarray(points[:, self._varied] / self._scale, dtype=np.float64)


def predicted_front(
    start: Rungs,
    predict: Callable[[Rungs], Array],
    size_of: Callable[[Rungs], Array],
    allowed: Sequence[Sequence[int]],
    rng: np.random.Generator,
    *,
    population: int,
    generations: int,
    crossover: float,
    mutation: float,
) -> Rungs:
    """The population that NSGA-II ends with, (n, L), non-dominated first: predicted values and sizes both minimised.

    Binomial crossover of two parents with this probability, and each place redrawn with that of mutation.

    Args:
        start: first population; filled up with variants of it.
        predict: values of points.
        size_of: sizes of points; infinite where a point is not allowed, which then comes last.
        allowed: places that each layer may take.
        rng: of all draws.
        population, generations: how many live, and how often they breed.
        crossover, mutation: probabilities.
    """
    living = np.unique(start, axis=0)
    for _ in range(generations):
        living = _survivors(np.concatenate([living, _children(living, allowed, rng, population, crossover, mutation)]),
                            predict, size_of, population)  # fmt: skip
    return living


def _children(
    parents: Rungs,
    allowed: Sequence[Sequence[int]],
    rng: np.random.Generator,
    size: int,
    crossover: float,
    mutation: float,
) -> Rungs:
    """Children of tournaments by place in the population, which is sorted, best first."""
    first, second = (np.minimum(*rng.integers(len(parents), size=(2, size))) for _ in range(2))
    mixed = (rng.random((size, 1)) < crossover) & (rng.random((size, parents.shape[1])) < 0.5)
    children = np.where(mixed, parents[second], parents[first])
    redrawn = np.stack([rng.choice(places, size=size) for places in allowed], axis=1)
    return np.where(rng.random(children.shape) < mutation, redrawn, children)


def _survivors(points: Rungs, predict: Callable[[Rungs], Array], size_of: Callable[[Rungs], Array], most: int) -> Rungs:
    from pymoo.operators.survival.rank_and_crowding.metrics import get_crowding_function
    from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

    points = np.unique(points, axis=0)
    sizes = size_of(points)
    fitting, over = points[np.isfinite(sizes)], points[~np.isfinite(sizes)]
    kept: list[Rungs] = []
    if len(fitting):
        objectives = np.column_stack([predict(fitting), sizes[np.isfinite(sizes)]])
        for front in NonDominatedSorting().do(objectives, n_stop_if_ranked=most):
            distance = get_crowding_function("cd").do(objectives[front], n_remove=0)
            kept.append(fitting[front[np.argsort(-distance, kind="stable")]])
    return np.concatenate([*kept, over])[:most]
