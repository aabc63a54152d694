"""LQ-LoRA: the largest singular values of the error as Fisher information weights it (Guo et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qratk.adapters.starts.base import Residual, Start, starts

if TYPE_CHECKING:
    from torch import nn

    from qratk.adapters.matrices.factors import Factors, Weighting
    from qratk.bank.linear import BankLinear, Packed


@starts.register("lq_lora")
@dataclass(frozen=True)
class LqLora(Start):
    """Best approximation of the weighted error; iterations end when it rises (arXiv:2311.12023, Algorithm 1)."""

    @property
    def weighted(self) -> bool:
        """True."""
        return True

    def weightings(
        self, model: nn.Module, projections: Mapping[str, BankLinear], batches: Sequence[dict[str, Any]]
    ) -> Mapping[str, Weighting]:
        """Square roots of the row and column means of the Fisher diagonal."""
        from qratk.adapters.matrices.fisher import fisher_weightings

        return fisher_weightings(model, projections, batches)

    def begin(self, residual: Residual, rank: int, iterations: int) -> tuple[Packed, Factors]:
        """Packed weight and factors of the iteration with the least weighted error, before it first rises."""
        from qratk.adapters.matrices.alternating import alternated

        return alternated(residual, rank, iterations)
