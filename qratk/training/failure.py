"""What makes a training fail that is the candidate's own."""

from __future__ import annotations

from qratk.core.errors import QratkError


class NonFiniteLossError(QratkError, ArithmeticError):
    """The loss of a training step is NaN or infinite."""


def not_finite(loss: float, step: int) -> str:
    """What to tell of a loss that is no number."""
    return (
        f"the loss is {loss} at step {step}; a smaller learning rate or gradient clipping "
        "(--trainer.gradient_clip_val=1.0) is the usual cure"
    )
