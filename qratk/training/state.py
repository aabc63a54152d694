"""What continuing a training needs, and the random states in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class TrainingState:
    """All that continuing a training needs: adapters, AdamW's moments by parameter name, random states, steps done.

    On CUDA dropout draws from the device's own generator: `device_random` is its state, and None on the CPU.
    """

    steps: int
    adapter: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    random: Tensor
    device_random: Tensor | None = None


def device_random_state(device: torch.device) -> Tensor | None:
    """State of a CUDA device's generator, a tensor on the CPU; None for the CPU, whose state torch has apart."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_random_state(random: Tensor, device_random: Tensor | None, device: torch.device) -> None:
    """Put the state of the CPU's generator in place, and that of a CUDA device where there is one."""
    torch.set_rng_state(random.cpu())
    if device.type == "cuda" and device_random is not None:
        torch.cuda.set_rng_state(device_random.cpu(), device)
