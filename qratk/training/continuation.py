"""Where a training goes on: after a rung of a search, from a fit's checkpoint, or nowhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from qratk.training.fit_checkpoint import FitCheckpoint
from qratk.training.optimisation import restore_moments
from qratk.training.state import TrainingState, set_random_state


@dataclass(frozen=True)
class Continuation:
    """What a training goes on from; Lightning itself restores the steps and moments of a checkpoint.

    Attributes:
        state: of a rung.
        loaded: the module's part of a checkpoint, until the training that goes on from it has begun.
    """

    state: TrainingState | None = None
    loaded: FitCheckpoint | None = None

    @property
    def steps(self) -> int:
        """Optimiser steps that were done before the trainer began."""
        return 0 if self.state is None else self.state.steps

    @property
    def allocation(self) -> Mapping[str, Tensor]:
        """State of what follows each step, among other things."""
        if self.state is not None:
            return self.state.optimizer
        return {} if self.loaded is None else self.loaded.allocation

    @property
    def begun(self) -> Continuation:
        """The same once the training has begun: another fit does not go on from the checkpoint."""
        return replace(self, loaded=None)

    def restore_moments(self, optimizer: Optimizer, named: Sequence[tuple[str, nn.Parameter]]) -> None:
        """Put a rung's moments in place."""
        if self.state is not None:
            restore_moments(optimizer, named, self.state.optimizer)

    def restore_random(self, device: torch.device) -> None:
        """Put the random states in place."""
        if self.state is not None:
            set_random_state(self.state.random, self.state.device_random, device)
        elif self.loaded is not None and self.loaded.random is not None:
            set_random_state(self.loaded.random, self.loaded.device_random, device)
