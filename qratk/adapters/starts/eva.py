"""EVA: the directions that a projection's inputs vary most in (Paischer et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from qratk.adapters.starts.base import Residual, Start, starts

if TYPE_CHECKING:
    from torch import nn

    from qratk.adapters.matrices.factors import Factors, Told
    from qratk.bank.linear import BankLinear, Packed


@starts.register("eva")
@dataclass(frozen=True)
class Eva(Start):
    """A begins at the principal directions of the inputs of training batches, B at zero (arXiv:2410.07170, section 3).

    Directions are those about the mean of all tokens but padding, at full precision and the same at every bit-width. A
    component for which there is none begins as by default. The ranks that go with it are the estimator's
    `explained_variance`.
    """

    approximates: ClassVar[bool] = False

    @property
    def weighted(self) -> bool:
        """True."""
        return True

    def weightings(
        self, model: nn.Module, projections: Mapping[str, BankLinear], batches: Sequence[dict[str, Any]]
    ) -> Mapping[str, Told]:
        """Leading principal directions of the inputs of every projection."""
        from qratk.adapters.matrices.principal import principal_directions

        return principal_directions(model, projections, batches)

    def begin(self, residual: Residual, rank: int, iterations: int) -> tuple[Packed, Factors]:
        """The bank's packed weight, and directions without effect."""
        from qratk.adapters.matrices.factors import Directions
        from qratk.adapters.matrices.principal import directed, without_effect

        assert isinstance(residual.weighting, Directions)  # it is what `weightings` returned
        return residual.packed, without_effect(
            directed(residual.weighting, rank, residual.group), residual.weight.shape[0]
        )
