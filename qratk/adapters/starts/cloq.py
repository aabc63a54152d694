"""CLoQ: the largest singular values of the error as the inputs see it (Deng et al. 2025)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qratk.adapters.starts.base import Residual, Start, starts
from qratk.core.errors import ConfigurationError

if TYPE_CHECKING:
    from torch import nn

    from qratk.adapters.matrices.factors import Factors, Weighting
    from qratk.bank.linear import BankLinear, Packed


@starts.register("cloq")
@dataclass(frozen=True)
class CLoQ(Start):
    """Best approximation of the error in the outputs, in closed form (arXiv:2501.18475).

    The inputs are those of calibration sequences at full precision, as for GPTQ. Iterations end when the error rises.
    """

    @property
    def weighted(self) -> bool:
        """False: it is moments that are asked for."""
        return False

    @property
    def calibrated(self) -> bool:
        """True."""
        return True

    def weightings(
        self, model: nn.Module, projections: Mapping[str, BankLinear], batches: Sequence[dict[str, Any]]
    ) -> Mapping[str, Weighting]:
        """Empty."""
        return {}

    def begin(self, residual: Residual, rank: int, iterations: int) -> tuple[Packed, Factors]:
        """Packed weight and factors of the iteration with the least output error, before it first rises."""
        from qratk.adapters.matrices.alternating import alternated
        from qratk.adapters.matrices.covariance import low_rank_for_inputs, output_error

        if residual.moments is None:
            raise ConfigurationError("'cloq' needs the moments of a projection's inputs, and none were given")
        second = residual.moments.second
        return alternated(
            residual,
            rank,
            iterations,
            approximated=lambda missing: low_rank_for_inputs(missing, rank, second, group=residual.group),
            cost=lambda error: output_error(error, second),
        )
