"""Second moments of what the first matrix of an adapter makes of its inputs."""

from __future__ import annotations

from typing import Final

from torch import Tensor

MOMENT: Final = ".lora_A.moment"
"""What the name of a projection's moment ends in, in a state."""


def second_moment(z: Tensor, mask: Tensor) -> Tensor:
    """Sum of z z^T, (..., r, r) float32, over the tokens of z (..., N, r) or (B, T, r) that a mask (B, T) counts.

    Where the shape of z says that tokens were gathered anew, as for an expert of a mixture, all of them count.
    """
    z = z.detach().float()
    if z.shape[:-1] == mask.shape:
        z = (z * mask.unsqueeze(-1).to(z.dtype)).flatten(0, -2)
    elif z.dim() > 2 and z.shape[-2] == mask.numel():
        z = z * mask.reshape(-1, 1).to(z.dtype)
    moment: Tensor = z.transpose(-1, -2) @ z
    return moment
