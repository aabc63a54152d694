"""Tensors of which each process may hold but a part."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds but a part of a tensor."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, outside of the graph; of a sharded one, all processes must ask."""
    detached: Any = tensor.detach()
    full: Tensor = detached.full_tensor() if is_sharded(tensor) else detached
    return full


def local(tensor: Tensor) -> Tensor:
    """The part that this process holds, in the same memory and outside of the graph."""
    detached: Any = tensor.detach()
    part: Tensor = detached.to_local() if is_sharded(tensor) else detached
    return part


def shard_like(parameter: Tensor, value: Tensor) -> Tensor:
    """A whole tensor that every process has, sharded as a parameter is; unchanged where that is whole."""
    if not is_sharded(parameter):
        return value
    from torch.distributed.tensor import distribute_tensor

    like: Any = parameter
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
