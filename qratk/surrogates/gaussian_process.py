"""Gaussian process from short to long runs (Rasmussen and Williams 2006, chapters 2 and 5)."""

from __future__ import annotations

from qratk.surrogates._process import fit_process
from qratk.surrogates._regression import Array, Features, Predictor, RegressionSurrogate
from qratk.surrogates.base import surrogates


@surrogates.register("gaussian_process")
class GaussianProcessRegression(RegressionSurrogate):
    """Linear in P(C; T_s), plus a Matern-5/2 process of bytes and configuration with one length-scale, plus noise.

    The autoregressive model of Kennedy and O'Hagan (2000, Eq. 1): y = rho y_low + delta(C). rho, the scales and the
    noise are fitted by marginal likelihood, with a broad prior. Trusted only while it ranks better than P(C; T_s)
    itself; see `RegressionSurrogate`.

    Args:
        features: what stands beside the score and the bytes: embedding (psi), weighted or both.
        residual: learn what the line through the pairs' scores leaves over, in place of the score itself.
        min_pairs: fewer pairs than this are not fitted.
        folds: of the cross-validation.
    """

    def __init__(
        self, features: Features = "embedding", residual: bool = False, min_pairs: int = 8, folds: int = 5
    ) -> None:
        super().__init__(features=features, residual=residual, min_pairs=min_pairs, folds=folds)

    def _fit(self, x: Array, y: Array) -> Predictor:
        return fit_process(x, y).predict
