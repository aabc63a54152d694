"""What every quantizer asks of a weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qratk.core.errors import QuantizationError

if TYPE_CHECKING:
    import torch


def require_finite(name: str, weight: torch.Tensor) -> None:
    """Raise `QuantizationError` when a weight holds NaN or infinity: one of them would spoil its whole group."""
    if not bool(weight.isfinite().all()):
        raise QuantizationError(
            f"{name!r}: the weight of {tuple(weight.shape)} holds values that are not finite; is the checkpoint whole?"
        )
