"""2, 3, 4 and 8 bits by GPTQ on a searched grid with whole zero points, as servers read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from qratk.core.errors import ConfigurationError
from qratk.quantizers._checks import require_finite
from qratk.quantizers._compensation import compensated, inverse_factor, require_moments
from qratk.quantizers._servable import ServableQuantizer
from qratk.quantizers.base import Moments, quantizers

if TYPE_CHECKING:
    import torch


@quantizers.register("affine_gptq")
@dataclass(frozen=True)
class AffineGPTQQuantizer(ServableQuantizer):
    """The form of `affine`, with codes that minimise E ||(W - Q(W)) x||^2 column by column (Frantar et al. 2022).

    Algorithm 1 of arXiv:2210.17323; the grid of a group is searched when it is reached, after corrections. Errors weigh
    in that search as they do in the algorithm: by 1 / U_jj^2, with U the Cholesky factor of the inverse second moment
    of the inputs. On inputs of which few stand out that takes 2 bits from a relative output error of 0.20 to 0.03
    (groups of 64), on correlated ones it changes nothing. Beside `gptq` its scales and zero points take 16 + bits bits
    a group instead of 32. Without moments, as in `quantize`, it is `affine`.

    Args:
        group_size: weights of a row that share a scale and a zero point; d_in must divide by it. Servers take 32, 64
            and 128.
        symmetric: no zero points are stored; they are 2^(bits - 1), which more kernels multiply by.
        metadata_dtype: type of scales. In float16 a scale cannot be under 6e-8: smaller weights become zero.
        clip: "mse" tries narrower ranges of each group for the least weighted squared error; "unbiased" is the same
            with moments, and without them as for `affine`; "none" takes the whole range.
        damping: share of the mean diagonal of E[x x^T] that is added to the diagonal.
    """

    damping: float = 0.01

    calibrated: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.damping <= 1:
            raise ConfigurationError(f"damping must be above 0 and at most 1, as in 0.01; got {self.damping}")

    def quantize(self, weight: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
        """`codes`, `scale` and, unless symmetric, `zero`, rounded to nearest."""
        self.check((weight.shape[0], weight.shape[1]), bits)
        require_finite(self._name, weight)
        return self._nearest(weight.detach().float(), bits)

    def quantize_calibrated(self, weight: torch.Tensor, bits: int, moments: Moments) -> dict[str, torch.Tensor]:
        """As `quantize`, with errors made up for."""
        from qratk.quantizers._search import codes_on

        self.check((weight.shape[0], weight.shape[1]), bits)
        require_finite(self._name, weight)
        require_moments(self._name, weight, moments)
        dense, size = weight.detach().float(), self.group_size
        factor = inverse_factor(moments.second.double(), self.damping).float()
        weights = factor.diagonal().square().reciprocal()
        empty = dense.new_empty(len(dense), dense.shape[1] // size)
        codes, scale, zero = compensated(
            dense,
            size,
            factor,
            (empty, empty.clone()),
            lambda _, values, step, offset: codes_on(values, step, offset, 2**bits - 1),
            grid_of=lambda index, group: self._grid(group, bits, weights[index * size : (index + 1) * size]),
        )
        return self._packed(codes, scale, zero, bits)
