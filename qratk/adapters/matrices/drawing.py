"""First values of adapters: seeded by projection, nested in rank, the same on every device and version of torch."""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from qratk.adapters.matrices.factors import Factors
from qratk.adapters.options import AdapterOptions
from qratk.core.errors import ConfigurationError


def initial_a(name: str, rank: int, d_in: int, *, seed: int) -> torch.Tensor:
    """First matrix of an adapter, (rank, d_in) float32, uniform as PEFT's: Kaiming with a = sqrt(5).

    Seeded by (seed, module name) and nested in rank: the matrix of rank 8 is the first 8 rows of that of rank 16, so
    that two configurations differ only where they differ.
    """
    rows = -(-rank // _ROWS) * _ROWS  # nested: what is kept serves all ranks up to there
    small = rows * d_in <= _SMALL_DRAW
    drawn = _small_uniform(name, rows, d_in, seed)[:rank] if small else _uniform(name, rank, d_in, seed)
    return torch.from_numpy(drawn).mul(1.0 / math.sqrt(d_in))


def normal(name: str, rows: int, columns: int, *, seed: int, std: float) -> torch.Tensor:
    """Matrix (rows, columns) float32 of a normal distribution, seeded by name and nested in its rows."""
    drawn = _generator(name, seed).standard_normal((rows, columns), dtype=np.float32)
    return torch.from_numpy(drawn).mul_(std)


def _uniform(name: str, rank: int, d_in: int, seed: int) -> NDArray[np.float32]:
    # In [-1, 1).
    drawn = _generator(name, seed).random((rank, d_in), dtype=np.float32)
    drawn *= np.float32(2.0)
    drawn -= np.float32(1.0)
    return drawn


def _generator(name: str, seed: int) -> np.random.Generator:
    # Matrices are filled row by row from one stream: the rows of a smaller one are the first of a larger one's.
    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key))


def initial_weights(
    name: str, shape: tuple[int, int], rank: int, options: AdapterOptions, *, seed: int, factors: Factors | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrices of a fresh adapter, A (rank, d_in / group) and B (d_out, rank), float32 on the CPU.

    With factors, scaling * B A is what they stand for, and nested in rank as they are; a component that they have none
    of begins as by default, with a random row of A and zeros in B, since an adapter of zeros would never learn. Where b
    alone is zero, A begins as it says, without scaling.
    """
    a = initial_a(name, rank, shape[1] // options.input_group, seed=seed)
    b = torch.zeros(shape[0], rank)
    if factors is None:
        return a, b
    if not factors.covers(rank):
        raise ConfigurationError(f"{name}: the initial adapters were made for ranks up to {factors.rank}, not {rank}")
    used = factors.used[:rank].nonzero()[:, 0]
    scale = options.scaling(rank) ** -0.5
    effect = factors.b[:, used].any(dim=0)
    a[used] = factors.a[used] * torch.where(effect, scale, 1.0)[:, None]
    b[:, used] = factors.b[:, used] * scale
    return a, b


# Candidates of a search begin with the same values again and again; at most 64 MiB of them are kept.
_ROWS, _SMALL_DRAW = 16, 1 << 13
_small_uniform = lru_cache(maxsize=2048)(_uniform)
