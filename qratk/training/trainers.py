"""Trainers for the short trainings of a search: hundreds of them, and not a word from any."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from unittest.mock import patch

from qratk.core.logs import only_errors

if TYPE_CHECKING:
    from lightning import LightningModule, Trainer

_QUIET: Final[dict[str, Any]] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "check_val_every_n_epoch": None,
    "val_check_interval": None,
    "max_epochs": -1,
}


@dataclass(frozen=True)
class QuietTrainers:
    """Makes Trainers without loggers, checkpoints and bars.

    Attributes:
        make: makes a Trainer from keyword arguments, which go before those of the command.
    """

    make: Callable[..., Trainer]

    def scoring(self) -> Trainer:
        """A Trainer to validate and test with."""
        return self._made()

    def training(self, steps: int) -> Trainer:
        """A Trainer for so many optimiser steps."""
        return self._made(max_steps=steps)

    def _made(self, **options: Any) -> Trainer:
        from qratk.training.telling import StepsTold

        with quiet_lightning():
            trainer = self.make(**_QUIET, **options)
        trainer.callbacks.append(StepsTold())  # type: ignore[attr-defined]
        return trainer


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Context without Lightning's notes on every Trainer: a search makes hundreds of them."""
    with only_errors("lightning.pytorch", "lightning.fabric"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
        yield


@contextmanager
def in_place(module: LightningModule) -> Iterator[None]:
    """Context in which Trainers leave a module on its device when they end, and say nothing.

    Lightning moves it to the CPU. The bank would go there and back for every candidate, and whoever looks next without
    a Trainer, for random states, cohorts or divergences, would find the model where the batches are not.
    """
    with quiet_lightning(), patch.object(module, "cpu", lambda: module):
        yield
