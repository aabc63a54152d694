"""The search space: which bits and ranks a layer may take, and how far two configurations are apart."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qratk.core.configuration import Configuration, Knob, LayerChoice
from qratk.core.errors import ConfigurationError

Direction = Literal[-1, 1]


def _checked_ladder(name: str, values: Sequence[int], smallest: int) -> tuple[int, ...]:
    ladder = tuple(int(value) for value in values)
    if not ladder or any(b <= a for a, b in itertools.pairwise(ladder)) or ladder[0] < smallest:
        raise ConfigurationError(
            f"{name} must be an ascending ladder of integers from {smallest} up, as in [2, 4, 8]; got {list(values)}"
        )
    return ladder


@dataclass(frozen=True)
class SearchSpace:
    """Ladders of bits and ranks shared by all layers, and the layers' names in model order."""

    bits: tuple[int, ...]
    ranks: tuple[int, ...]
    layer_names: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", _checked_ladder("bits", self.bits, 1))
        object.__setattr__(self, "ranks", _checked_ladder("ranks", self.ranks, 0))
        if not self.layer_names:
            raise ConfigurationError("a search space needs at least one layer")

    @property
    def num_layers(self) -> int:
        """Number of layers, L."""
        return len(self.layer_names)

    @property
    def log10_size(self) -> float:
        """Decimal logarithm of the number of configurations."""
        return float(self.num_layers * np.log10(len(self.bits) * len(self.ranks)))

    @cached_property
    def smallest(self) -> Configuration:
        """Configuration with the lowest rung of both ladders everywhere."""
        return self.uniform(self.bits[0], self.ranks[0])

    @cached_property
    def largest(self) -> Configuration:
        """Configuration with the highest rung of both ladders everywhere."""
        return self.uniform(self.bits[-1], self.ranks[-1])

    def uniform(self, bits: int, rank: int) -> Configuration:
        """Configuration with the same choice everywhere; raises `ConfigurationError` off the ladders."""
        configuration = Configuration.uniform(bits, rank, self.num_layers)
        self.validate(configuration)
        return configuration

    def uniforms(self) -> tuple[Configuration, ...]:
        """Every uniform configuration, by bits and then ranks."""
        return tuple(self.uniform(bits, rank) for bits in self.bits for rank in self.ranks)

    def ladder(self, knob: Knob) -> tuple[int, ...]:
        """The ladder of a knob."""
        return self.bits if knob == "bits" else self.ranks

    def __contains__(self, configuration: Configuration) -> bool:
        """Whether every layer's choice is on the ladders; a reference of the user's need not be."""
        return len(configuration) == self.num_layers and all(c in self._positions for c in configuration.layers)

    def validate(self, configuration: Configuration) -> None:
        """Raise `ConfigurationError` unless every layer's choice is on the ladders."""
        if len(configuration) != self.num_layers:
            raise ConfigurationError(
                f"a configuration of {self.num_layers} layers is needed, got one of {len(configuration)}"
            )
        for name, choice in zip(self.layer_names, configuration.layers, strict=True):
            if choice.bits not in self.bits:
                raise ConfigurationError(f"bits must be one of {self.bits}, got {choice.bits} for layer {name!r}")
            if choice.rank not in self.ranks:
                raise ConfigurationError(f"rank must be one of {self.ranks}, got {choice.rank} for layer {name!r}")

    def indices(self, configuration: Configuration) -> NDArray[np.int64]:
        """Ordinal index of each choice on its ladder, (L, 2): bits, then rank."""
        if len(configuration) != self.num_layers:
            self.validate(configuration)
        try:
            pairs = [self._positions[choice] for choice in configuration.layers]
        except KeyError:
            self.validate(configuration)
            raise
        return np.array(pairs, dtype=np.int64)

    def from_indices(self, indices: NDArray[np.int64]) -> Configuration:
        """Configuration at the given ordinal indices (L, 2)."""
        return Configuration(tuple(self._choices[i][j] for i, j in indices.tolist()))

    @cached_property
    def _choices(self) -> tuple[tuple[LayerChoice, ...], ...]:
        """The choices by ordinal indices; shared between configurations."""
        return tuple(tuple(LayerChoice(bits, rank) for rank in self.ranks) for bits in self.bits)

    @cached_property
    def _positions(self) -> dict[LayerChoice, tuple[int, int]]:
        """Ordinal indices of each choice."""
        return {choice: (i, j) for i, row in enumerate(self._choices) for j, choice in enumerate(row)}

    def step(self, configuration: Configuration, layer: int, knob: Knob, direction: Direction) -> Configuration | None:
        """Configuration one atomic edit away; None at the end of the ladder."""
        ladder = self.ladder(knob)
        choice = configuration.layers[layer]
        index = ladder.index(choice.bits if knob == "bits" else choice.rank) + direction
        if not 0 <= index < len(ladder):
            return None
        if knob == "bits":
            return configuration.replace(layer, bits=ladder[index])
        return configuration.replace(layer, rank=ladder[index])

    def neighbours(self, configuration: Configuration) -> tuple[Configuration, ...]:
        """All configurations one atomic edit away: at most 4 L of them."""
        found = []
        for layer in range(self.num_layers):
            for knob in ("bits", "rank"):
                for direction in (-1, 1):
                    step = self.step(configuration, layer, knob, direction)
                    if step is not None:
                        found.append(step)
        return tuple(found)

    def atomic_distance(self, a: Configuration, b: Configuration) -> int:
        """Smallest number of atomic edits from a to b (section 3.3)."""
        return int(np.abs(self.indices(a) - self.indices(b)).sum())

    def embed(self, configuration: Configuration) -> NDArray[np.float64]:
        """Standardised ordinal embedding psi, (2L,): all bits, then all ranks.

        Each ladder index is standardised by the mean and standard deviation of its ladder's indices, so that the
        embedding of a configuration does not depend on what else was evaluated. A ladder of one rung embeds as 0.
        """
        indices = self.indices(configuration).astype(np.float64)
        columns = []
        for column, ladder in enumerate((self.bits, self.ranks)):
            rungs = np.arange(len(ladder), dtype=np.float64)
            columns.append((indices[:, column] - rungs.mean()) / (rungs.std() or 1.0))
        return np.concatenate(columns)

    def random(self, rng: np.random.Generator) -> Configuration:
        """Configuration drawn uniformly from the space, feasible or not."""
        bits = rng.integers(len(self.bits), size=self.num_layers)
        ranks = rng.integers(len(self.ranks), size=self.num_layers)
        return self.from_indices(np.stack([bits, ranks], axis=1))
