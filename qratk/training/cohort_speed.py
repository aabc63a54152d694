"""How many candidates to train side by side: measured on the machine at hand."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from lightning import Trainer
from torch import Tensor

from qratk.bank.dense import available_memory, is_out_of_memory
from qratk.core.configuration import Configuration
from qratk.core.memory import Footprint
from qratk.training.cohort import Cohort
from qratk.training.cohort_module import CohortModule
from qratk.training.module import FineTuneModule

LARGEST: Final = 32
"""Candidates side by side at most, however fast more would be."""

_GAIN = 0.97  # a larger cohort must be faster for each candidate by this factor


def fastest_cohort(
    module: FineTuneModule,
    trainer: Trainer,
    batch: Mapping[str, Tensor],
    configurations: Sequence[Configuration],
    *,
    largest: int,
) -> int:
    """Candidates side by side that take the least time each: 1, 2, 4, ... are tried until more does not pay.

    Two training steps are done for each number, on fresh adapters that are thrown away. `trainer` gives precision and
    device; `configurations` are repeated as needed.
    """
    best, least = 1, float("inf")
    for size in _powers_of_two(largest):
        members = [configurations[index % len(configurations)] for index in range(size)]
        try:
            seconds = _seconds_a_candidate(module, trainer, batch, members)
        except (MemoryError, RuntimeError) as error:
            if size == 1 or not is_out_of_memory(error):
                raise
            return best
        if seconds > _GAIN * least:
            return best
        best, least = size, seconds
    return best


def fitting(device: torch.device, footprints: Sequence[Footprint]) -> int:
    """How many candidates of such footprints train side by side within half of the memory that is free on a device."""
    each = max(f.training_bytes - f.weights - f.metadata - f.fixed for f in footprints)
    return available_memory(device) // 2 // max(1, each)


def _powers_of_two(largest: int) -> Iterator[int]:
    size = 1
    while size <= max(1, largest):
        yield size
        size *= 2


def _seconds_a_candidate(
    module: FineTuneModule, trainer: Trainer, batch: Mapping[str, Tensor], members: Sequence[Configuration]
) -> float:
    if len(members) == 1:
        module.activate(members[0])
        module.train()
        parameters = [p for _, p in module.backbone.trainable_parameters()]
        return _quickest_step(lambda: module.training_loss(batch), parameters, module, trainer)
    cohort = Cohort.of(module.backbone, members, seed=module.options.training_seed)
    with cohort.installed():
        together = CohortModule(module, cohort)
        together.train()
        parameters = [p for _, p in cohort.parameters()]
        losses: Callable[[], Tensor] = lambda: together.candidate_losses(dict(batch)).sum()  # noqa: E731
        return _quickest_step(losses, parameters, module, trainer) / len(members)


def _quickest_step(
    loss: Callable[[], Tensor], parameters: Sequence[torch.nn.Parameter], module: FineTuneModule, trainer: Trainer
) -> float:
    optimizer = module.make_optimizer(parameters, trainer)
    quickest = float("inf")
    for _ in range(2):
        began = _now(parameters[0].device)
        with trainer.strategy.precision_plugin.train_step_context():
            value: Any = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        quickest = min(quickest, _now(parameters[0].device) - began)
    return quickest


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
