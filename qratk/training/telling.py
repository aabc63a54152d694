"""How far a training or a scoring is, told to whoever listens."""

from __future__ import annotations

import math
import time
from typing import Any

from lightning import Callback, LightningModule, Trainer

from qratk.core.work import Work, tell


class StepsTold(Callback):
    """Tells of optimiser steps as "training", and of batches as "scoring"."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count time."""
        self._began = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, *rest: Any) -> None:
        """Tell of the optimiser steps done."""
        self._tell("training", trainer.global_step, max(0, trainer.max_steps))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count time."""
        self._began = time.monotonic()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *rest: Any
    ) -> None:
        """Tell of the batches scored."""
        self._tell("scoring", batch_idx + 1, sum(trainer.num_val_batches))

    def _tell(self, what: str, done: int, total: float) -> None:
        known = int(total) if math.isfinite(total) else None
        tell(Work(what, done, known, time.monotonic() - self._began))
