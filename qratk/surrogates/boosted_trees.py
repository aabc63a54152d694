"""Boosted regression trees from short to long runs (Friedman 2001)."""

from __future__ import annotations

from qratk.core.errors import ConfigurationError
from qratk.surrogates._regression import Array, Features, Predictor, RegressionSurrogate
from qratk.surrogates.base import surrogates


@surrogates.register("boosted_trees")
class BoostedTrees(RegressionSurrogate):
    """Gradient boosting of shallow trees with the squared loss (Friedman 2001, Algorithm 2).

    Trees cannot say more than the best pair did: with `residual` the line in P(C; T_s) goes beyond it. Trusted only
    while it ranks better than P(C; T_s) itself; see `RegressionSurrogate`.

    Args:
        trees: how many.
        depth: of a tree: 2 lets pairs of features interact.
        rate: share of each tree that is added.
        leaf: fewest pairs in a leaf.
        features: what stands beside the score and the bytes: embedding (psi), weighted or both.
        residual: learn what the line through the pairs' scores leaves over, in place of the score itself.
        min_pairs: fewer pairs than this are not fitted.
        folds: of the cross-validation.
    """

    def __init__(
        self,
        trees: int = 50,
        depth: int = 2,
        rate: float = 0.1,
        leaf: int = 3,
        features: Features = "weighted",
        residual: bool = False,
        min_pairs: int = 8,
        folds: int = 5,
    ) -> None:
        super().__init__(features=features, residual=residual, min_pairs=min_pairs, folds=folds)
        if min(trees, depth, leaf) < 1 or not 0 < rate <= 1:
            raise ConfigurationError(
                f"trees, depth and leaf must be at least 1 and rate in (0, 1], got {trees}, {depth}, {leaf} and {rate}"
            )
        self.trees = trees
        self.depth = depth
        self.rate = rate
        self.leaf = leaf

    def _fit(self, x: Array, y: Array) -> Predictor:
        from qratk.surrogates import _sklearn

        return _sklearn.BoostedTrees(x, y, trees=self.trees, depth=self.depth, rate=self.rate, leaf=self.leaf)
