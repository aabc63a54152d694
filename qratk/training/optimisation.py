"""AdamW and its schedule: made from options, and continued where a rung ended."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from lightning.pytorch.utilities.types import LRSchedulerConfigType
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from qratk.training.options import FineTuneOptions, Schedule


def adamw(options: FineTuneOptions, parameters: Iterable[nn.Parameter], *, rate_factor: float, precision: str) -> AdamW:
    """AdamW with the options given, in one fused kernel except where Lightning has to unscale gradients.

    `rate_factor` is the adapter method's, times the learning rate; `precision` is the Trainer's.
    """
    return AdamW(
        parameters,
        lr=rate_factor * options.learning_rate,
        betas=options.betas,
        weight_decay=options.weight_decay,
        fused=not precision.endswith("mixed"),
    )


class MemberSteps:
    """A learning rate, decay and schedule for each member of stacked parameters, (K, ...) each.

    The optimiser steps at rate 1 without decay; what it did to a member is then scaled by that member's rate, which
    AdamW's steps are proportional to. To be `attached` to the optimiser.

    Args:
        parameters: the stacked parameters.
        options: those of each member.
        rate_factor: the adapter method's, times the learning rates.
        start: steps that were done before.
        total: steps of the whole schedule.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        options: Sequence[FineTuneOptions],
        *,
        rate_factor: float,
        start: int,
        total: int,
    ) -> None:
        self._parameters, self._options = parameters, options
        self._rate_factor, self._total, self._done = rate_factor, total, start
        self._before: list[Tensor] = []

    def attached(self, *, precision: str) -> AdamW:
        """AdamW over the parameters, each member stepped as it would be by itself."""
        one = replace(self._options[0], learning_rate=1.0, weight_decay=0.0)
        optimizer = adamw(one, self._parameters, rate_factor=1.0, precision=precision)
        optimizer.register_step_pre_hook(lambda *_: self._note())
        optimizer.register_step_post_hook(lambda *_: self._scale())
        return optimizer

    def rates(self) -> list[float]:
        """The learning rate of each member at the step that is due."""
        return [
            self._rate_factor
            * own.learning_rate
            * learning_rate_factor(self._done, self._total, own.warmup_steps, own.schedule)
            for own in self._options
        ]

    def _note(self) -> None:
        self._before = [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def _scale(self) -> None:
        rates = self.rates()
        kept = [1.0 - rate * own.weight_decay for rate, own in zip(rates, self._options, strict=True)]
        for parameter, before in zip(self._parameters, self._before, strict=True):
            shape = (-1, *(1,) * (parameter.dim() - 1))
            step = parameter.detach() - before
            scaled = step * step.new_tensor(rates).reshape(shape)
            parameter.copy_(before * before.new_tensor(kept).reshape(shape) + scaled)
        self._before, self._done = [], self._done + 1


def step_schedule(options: FineTuneOptions, optimizer: Optimizer, *, start: int, total: int) -> LRSchedulerConfigType:
    """Schedule of `total` steps, as Lightning takes it, of a training that begins after `start` of them."""
    scheduler = LambdaLR(
        optimizer, lambda step: learning_rate_factor(start + step, total, options.warmup_steps, options.schedule)
    )
    return {"scheduler": scheduler, "interval": "step"}


def learning_rate_factor(step: int, total: int, warmup_steps: int, schedule: Schedule) -> float:
    """Share of the learning rate at a step (from 0): linear warm-up, then constant, linear or cosine down to 0."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    done = min(1.0, (step - warmup_steps) / max(1, total - warmup_steps))
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def moments_of(optimizer: Optimizer, named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """Copies on the CPU of an optimiser's state, as `<parameter>/<moment>`."""
    return {
        f"{name}/{key}": value.detach().cpu().clone()
        for name, parameter in named
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_moments(
    optimizer: Optimizer, named: Sequence[tuple[str, nn.Parameter]], moments: Mapping[str, Tensor]
) -> None:
    """Put the state of all parameters in place, each tensor where AdamW wants it."""
    for name, parameter in named:
        state = {key.rsplit("/", 1)[1]: value for key, value in moments.items() if key.rsplit("/", 1)[0] == name}
        optimizer.state[parameter] = {
            key: value.clone() if key == "step" else value.to(parameter.device, copy=True)
            for key, value in state.items()
        }
    place_steps(optimizer)


def place_steps(optimizer: Optimizer) -> None:
    """Move restored step counts to where AdamW wants them: its fused kernel has them beside the parameters."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("fused") else ():
            state = optimizer.state.get(parameter, {})
            if "step" in state:
                state["step"] = state["step"].to(parameter.device)
