"""The problem that every strategy is handed: space, bytes, budget and importance."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from qratk.core.configuration import Configuration, Knob
from qratk.core.errors import ConfigurationError
from qratk.core.evaluation import Evaluation
from qratk.core.memory import Budget, Footprint, LayerShape, MemoryModel
from qratk.core.space import SearchSpace


def min_max(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scores mapped to [0, 1] over layers; all 1 when they are equal, which leaves proposals uniform."""
    low, high = float(scores.min()), float(scores.max())
    if not high > low:
        return np.ones_like(scores)
    return (scores - low) / (high - low)


@dataclass(frozen=True)
class Importance:
    """Raw layer scores: `bits` for the bit-width, `rank` for the adapter, each (L,) (Eq. 24, 26).

    Where an estimator tells rungs apart, `costs` is what each bit-width costs a layer, (L, bits), and `gains` what each
    rank brings it, (L, ranks); else these follow from the scores (`qratk.programs.integer`).
    """

    bits: tuple[float, ...]
    rank: tuple[float, ...]
    costs: tuple[tuple[float, ...], ...] | None = None
    gains: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self) -> None:
        for name, scores in (("bits", self.bits), ("rank", self.rank), ("bits", self.costs), ("rank", self.gains)):
            if scores is not None and (not np.all(np.isfinite(scores)) or np.any(np.asarray(scores) < 0)):
                raise ConfigurationError(f"importance for {name} must be finite and not negative, got {scores}")

    @classmethod
    def uniform(cls, num_layers: int) -> Importance:
        """The same importance everywhere."""
        return cls((1.0,) * num_layers, (1.0,) * num_layers)

    def normalised(self, knob: Knob) -> NDArray[np.float64]:
        """Min-max normalised scores of a knob, (L,)."""
        return min_max(np.asarray(self.bits if knob == "bits" else self.rank, dtype=np.float64))


@dataclass(frozen=True)
class Problem:
    """What is searched: the layers, the space, their bytes, the budget and the importance of layers."""

    shapes: tuple[LayerShape, ...]
    memory: MemoryModel
    budget: Budget
    importance: Importance

    @property
    def space(self) -> SearchSpace:
        """Ladders and layers."""
        return self.memory.space

    @property
    def num_layers(self) -> int:
        """Number of layers, L."""
        return self.space.num_layers

    @cached_property
    def normalised_importance(self) -> dict[Knob, NDArray[np.float64]]:
        """Min-max normalised scores by knob, each (L,)."""
        return {"bits": self.importance.normalised("bits"), "rank": self.importance.normalised("rank")}

    def bytes(self, configuration: Configuration) -> int:
        """Bytes in the budget's scope, M(C)."""
        return self.memory.bytes(configuration, self.budget.scope)

    def table(self, knob: Knob) -> NDArray[np.int64]:
        """Bytes of each rung of a knob in the budget's scope, (L, rungs)."""
        return self.memory.table(self.budget.scope, knob)

    def footprint(self, configuration: Configuration) -> Footprint:
        """All byte figures of a configuration."""
        return self.memory.footprint(configuration)

    def violation(self, configuration: Configuration) -> float:
        """Relative excess over the budget; 0 when it fits."""
        return self.budget.violation(self.memory, configuration)

    def feasible(self, configuration: Configuration) -> bool:
        """Whether the configuration fits the budget."""
        return self.violation(configuration) == 0.0

    def fits(self, evaluation: Evaluation) -> bool:
        """Whether what was measured fits the budget; off the ladders (a reference in 16 bits) its own bytes say so."""
        if evaluation.configuration in self.space:
            return self.feasible(evaluation.configuration)
        size = evaluation.footprint.bytes(self.budget.scope)
        return self.budget.excess(size, self.memory.average_bits(evaluation.configuration)) == 0.0
