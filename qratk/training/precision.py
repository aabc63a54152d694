"""In which precision a Trainer may train."""

from __future__ import annotations

from lightning import Trainer

from qratk.core.errors import ConfigurationError


def require_precision(trainer: Trainer) -> None:
    """Raise `ConfigurationError` where Lightning would cast the adapters' float32 masters to another type."""
    precision = str(trainer.precision)
    if precision in ("32-true", "bf16-mixed", "16-mixed"):
        return
    cure = {"bf16-true": "--model.compute_dtype=bfloat16", "16-true": "--model.compute_dtype=float16"}
    raise ConfigurationError(
        f"--trainer.precision={precision} would cast the adapters' float32 masters and the model's buffers; leave it "
        f"out and give {cure.get(precision, '--model.compute_dtype')} instead: activations and frozen weights are "
        "of that type then, and the adapters are trained in float32"
    )
