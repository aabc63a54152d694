"""Regressors for tens of pairs, deterministic; features and targets are standardised by the caller."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import GradientBoostingRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPRegressor

Array = NDArray[np.float64]


class Networks:
    """Mean of small tanh networks with an L2 penalty, from several starts."""

    def __init__(self, x: Array, y: Array, *, hidden: int, l2: float, starts: int) -> None:
        self._models = [
            MLPRegressor(
                hidden_layer_sizes=(hidden,),
                activation="tanh",
                solver="lbfgs",
                alpha=l2,
                max_iter=200,
                random_state=start,
            )
            for start in range(starts)
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # 200 steps are enough, the minimum or not
            for model in self._models:
                model.fit(x, y)

    def __call__(self, x: Array) -> Array:
        """Mean prediction, (n,)."""
        return np.asarray(np.mean([model.predict(x) for model in self._models], axis=0), dtype=np.float64)


class BoostedTrees:
    """Gradient boosting by shallow trees."""

    def __init__(self, x: Array, y: Array, *, trees: int, depth: int, rate: float, leaf: int) -> None:
        self._model = GradientBoostingRegressor(
            n_estimators=trees, max_depth=depth, learning_rate=rate, min_samples_leaf=leaf, random_state=0
        )
        self._model.fit(x, y)

    def __call__(self, x: Array) -> Array:
        """Prediction, (n,)."""
        return np.asarray(self._model.predict(x), dtype=np.float64)
