"""Gaussian process from short to long runs (Rasmussen and Williams 2006, chapters 2 and 5)."""

from __future__ import annotations

from qratk.surrogates._process import fit_process
from qratk.surrogates._regression import Array, Features, Predictor, RegressionSurrogate
from qratk.surrogates.base import surrogates


@surrogates.register("gaussian_process")
class GaussianProcessRegression(RegressionSurrogate):
    """A line in all features plus a Matern-5/2 process of them with one length-scale, plus noise.

    Scales and noise are fitted by marginal likelihood, with a broad prior. Where the line alone explains the pairs,
    this is ridge regression. A line in P(C; T_s) alone, the autoregressive model of Kennedy and O'Hagan (2000, Eq. 1),
    was tried and found fewer of the top three in toy searches: short runs are too noisy to lean on. Trusted only while
    it ranks better than P(C; T_s) itself; see `RegressionSurrogate`.

    Args:
        features: what stands beside the score and the bytes: embedding (psi), weighted or both.
        residual: learn what the line through the pairs' scores leaves over, in place of the score itself.
        min_pairs: fewer pairs than this are not fitted.
        folds: of the cross-validation.
    """

    def __init__(
        self, features: Features = "weighted", residual: bool = False, min_pairs: int = 8, folds: int = 5
    ) -> None:
        super().__init__(features=features, residual=residual, min_pairs=min_pairs, folds=folds)

    def _fit(self, x: Array, y: Array) -> Predictor:
        return fit_process(x, y).predict
