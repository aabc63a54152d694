"""Weighted draws shared by the mutation operators."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from qratk.core.errors import ConfigurationError
from qratk.core.shared import Shared

Direction = Literal["directed", "either"]


def check_options(gamma: float, epsilon: float, direction: str) -> None:
    """Raise `ConfigurationError` unless the options of Eq. 9 make sense."""
    if not gamma > 0:
        raise ConfigurationError(f"gamma must be positive, got {gamma}")
    if not epsilon > 0:
        raise ConfigurationError(f"epsilon must be positive, got {epsilon}")
    if direction not in get_args(Direction):
        raise ConfigurationError(f"direction must be one of {get_args(Direction)}, got {direction!r}")


def draw(weights: NDArray[np.float64], rng: np.random.Generator) -> int | None:
    """Flat index drawn with probability proportional to the weights; None when all are 0."""
    # Divided by the largest first: inverse powers of a small epsilon must not overflow the sum.
    largest = float(weights.max(initial=0.0))
    if not largest > 0:
        return None
    total = np.cumsum(weights.ravel() / largest)
    drawn = int(np.searchsorted(total, rng.random() * total[-1], side="right"))
    return min(drawn, int(np.flatnonzero(weights.ravel())[-1]))


def draw_column(possible: NDArray[np.bool_], rng: np.random.Generator) -> int | None:
    """One of the columns of (L, 2) in which anything is possible, in equal parts; None when there is none."""
    columns = np.flatnonzero(possible.any(axis=0))
    return int(columns[int(rng.integers(len(columns)))]) if len(columns) else None


def mixed(ours: Shared, theirs: Shared, share: float, rng: np.random.Generator) -> Shared:
    """Settings of which each is theirs with probability `share`, else ours; nothing is drawn where there are none."""
    return tuple(their if rng.random() < share else our for our, their in zip(ours, theirs, strict=True))
