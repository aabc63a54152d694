"""Passes through a model that measure and change nothing: no dropout, and no number drawn that training would miss."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) with the random state and every module's own mode restored afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module in training:
            module.training = True
