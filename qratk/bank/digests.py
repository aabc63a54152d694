"""What tells tensors and texts apart: SHA-256 where it names something, CRC-32 where it only shows damage."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Mapping

import torch


def sha256_of(lines: Iterable[str]) -> str:
    """SHA-256 of lines of text, hexadecimal."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def tensor_digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's type, shape and bytes, hexadecimal."""
    hasher = hashlib.sha256(f"{tensor.dtype}:{tuple(tensor.shape)}".encode())
    hasher.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def weights_digest(names: Iterable[str], digests: Mapping[str, str]) -> str:
    """What names the store of a model: a digest of its projections' names and weights."""
    return sha256_of(f"{name}:{digests[f'{name}.weight']}" for name in names)


def checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """CRC-32 of names, types, shapes and bytes: against accidents, and more than twice as fast as SHA-256."""
    value = 0
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value) if tensor.numel() else value
    return f"{value:08x}"
