"""LoftQ: the largest singular values of the quantisation error (Li et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qratk.adapters.starts.base import Residual, Start, starts

if TYPE_CHECKING:
    from torch import nn

    from qratk.adapters.matrices.factors import Factors, Weighting
    from qratk.bank.linear import BankLinear, Packed


@starts.register("loftq")
@dataclass(frozen=True)
class LoftQ(Start):
    """Best approximation of the error, whatever an entry costs; all iterations are done (arXiv:2310.08659, Alg. 1)."""

    @property
    def weighted(self) -> bool:
        """False: all errors cost the same."""
        return False

    def weightings(
        self, model: nn.Module, projections: Mapping[str, BankLinear], batches: Sequence[dict[str, Any]]
    ) -> Mapping[str, Weighting]:
        """Empty."""
        return {}

    def begin(self, residual: Residual, rank: int, iterations: int) -> tuple[Packed, Factors]:
        """Packed weight and factors after all iterations."""
        from qratk.adapters.matrices.alternating import alternated

        return alternated(residual, rank, iterations)
