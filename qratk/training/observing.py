"""Passes of training batches in which adapters see what decides how they are stored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from qratk.backbone.logits import training_losses

if TYPE_CHECKING:
    from qratk.data.base import TaskData


class Observer(Protocol):
    """Adapters of one candidate, or of several."""

    def observe(self, batches: Iterable[Mapping[str, Tensor]], run: Callable[[Mapping[str, Tensor]], object]) -> None:
        """As `Adapters.observe`."""


def observe(
    observer: Observer, model: nn.Module, data: TaskData, count: int, *, device: torch.device, candidates: int = 1
) -> None:
    """Have so many training batches observed, as the model is, without dropout; nothing where none are wanted.

    They are the same at every call, and no random number is drawn.
    """
    if not count:
        return
    batches = ({n: value.to(device) for n, value in batch.items()} for batch in data.calibration_batches(count))
    training = model.training
    model.train(False)
    try:
        with torch.no_grad():
            observer.observe(batches, lambda batch: training_losses(model, batch, candidates, overhead=None))
    finally:
        model.train(training)
