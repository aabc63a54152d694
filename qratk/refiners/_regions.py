"""Discrete trust regions: centres, radii and how one evaluation changes them (Eq. 18, 19)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError
from qratk.core.space import SearchSpace


@dataclass(frozen=True)
class RadiusRule:
    """Bounds and factors of the integer radius: doubled on success, halved on failure by default (Eq. 18)."""

    start: int = 2
    lowest: int = 1
    highest: int = 8
    expand: float = 2.0
    shrink: float = 0.5

    def __post_init__(self) -> None:
        if not 1 <= self.lowest <= self.start <= self.highest:
            raise ConfigurationError(
                "radii must satisfy 1 <= min_radius <= radius <= max_radius, "
                f"got {self.lowest}, {self.start}, {self.highest}"
            )
        if not (self.expand >= 1 and 0 < self.shrink <= 1):
            raise ConfigurationError(f"expand must be >= 1 and shrink in (0, 1], got {self.expand} and {self.shrink}")

    def grown(self, radius: int) -> int:
        """Radius after a success: rounded up, so that any factor over 1 has an effect."""
        return min(math.ceil(self.expand * radius), self.highest)

    def shrunk(self, radius: int) -> int:
        """Radius after a failure: rounded down."""
        return max(math.floor(self.shrink * radius), self.lowest)


@dataclass(frozen=True)
class Region:
    """Ball of `radius` atomic edits around `centre`; `evaluations` counts runs at the highest rung spent on it."""

    centre: Configuration
    radius: int
    evaluations: int = 0

    def after(self, configuration: Configuration, *, improved: bool, rule: RadiusRule) -> Region:
        """Region after its candidate was measured: moved and grown when that beat all before, shrunk otherwise."""
        if improved:
            return Region(configuration, rule.grown(self.radius), self.evaluations + 1)
        return replace(self, radius=rule.shrunk(self.radius), evaluations=self.evaluations + 1)


def spread(
    ranked: Sequence[Configuration],
    space: SearchSpace,
    *,
    count: int,
    distance: int,
    taken: Sequence[Configuration] = (),
) -> tuple[Configuration, ...]:
    """At most `count` configurations, in the given order, each `distance` edits from one another and from `taken`."""
    chosen: list[Configuration] = []
    for configuration in ranked:
        if len(chosen) == count:
            break
        if all(space.atomic_distance(configuration, other) >= distance for other in (*taken, *chosen)):
            chosen.append(configuration)
    return tuple(chosen)
