"""Small neural networks from short to long runs."""

from __future__ import annotations

from qratk.core.errors import ConfigurationError
from qratk.surrogates._regression import Array, Features, Predictor, RegressionSurrogate
from qratk.surrogates.base import surrogates


@surrogates.register("network")
class SmallNetwork(RegressionSurrogate):
    """Mean of a few tanh networks of one hidden layer, fitted by L-BFGS with an L2 penalty.

    A mean over starts is steadier than one network (Lakshminarayanan et al. 2017). Trusted only while it ranks better
    than P(C; T_s) itself; see `RegressionSurrogate`.

    Args:
        hidden: width of the hidden layer.
        l2: the penalty on the weights, on standardised features and target.
        starts: networks, each from its own seed.
        features: what stands beside the score and the bytes: embedding (psi), weighted or both.
        residual: learn what the line through the pairs' scores leaves over, in place of the score itself.
        min_pairs: fewer pairs than this are not fitted.
        folds: of the cross-validation.
    """

    def __init__(
        self,
        hidden: int = 8,
        l2: float = 1.0,
        starts: int = 3,
        features: Features = "weighted",
        residual: bool = False,
        min_pairs: int = 8,
        folds: int = 5,
    ) -> None:
        super().__init__(features=features, residual=residual, min_pairs=min_pairs, folds=folds)
        if hidden < 1 or starts < 1 or not l2 > 0:
            raise ConfigurationError(
                f"hidden and starts must be at least 1 and l2 positive, got {hidden}, {starts} and {l2}"
            )
        self.hidden = hidden
        self.l2 = l2
        self.starts = starts

    def _fit(self, x: Array, y: Array) -> Predictor:
        from qratk.surrogates import _sklearn

        return _sklearn.Networks(x, y, hidden=self.hidden, l2=self.l2, starts=self.starts)
