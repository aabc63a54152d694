"""The search space: what each layer may take, and all of them together, and how far two configurations are apart."""

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
from qratk.core.shared import REPLICATE, Shared, SharedLadder, spread_size

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
    """Ladders of bits and ranks shared by all layers, and the layers' names in model order.

    `shared` are the ladders of settings that a configuration has one value of, whatever its layers; sorted by name.
    """

    bits: tuple[int, ...]
    ranks: tuple[int, ...]
    layer_names: tuple[str, ...]
    shared: tuple[SharedLadder, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", _checked_ladder("bits", self.bits, 1))
        object.__setattr__(self, "ranks", _checked_ladder("ranks", self.ranks, 0))
        if not self.layer_names:
            raise ConfigurationError("a search space needs at least one layer")
        object.__setattr__(self, "shared", tuple(sorted(self.shared, key=lambda ladder: ladder.name)))

    @property
    def num_layers(self) -> int:
        """Number of layers, L."""
        return len(self.layer_names)

    @property
    def log10_size(self) -> float:
        """Decimal logarithm of the number of configurations."""
        layers = float(self.num_layers * np.log10(len(self.bits) * len(self.ranks)))
        return layers + sum(float(np.log10(len(ladder.values))) for ladder in self.shared)

    @cached_property
    def smallest(self) -> Configuration:
        """Configuration with the lowest rung of both ladders everywhere, and the middle settings."""
        return self.uniform(self.bits[0], self.ranks[0])

    @cached_property
    def largest(self) -> Configuration:
        """Configuration with the highest rung of both ladders everywhere, and the middle settings."""
        return self.uniform(self.bits[-1], self.ranks[-1])

    def uniform(self, bits: int, rank: int) -> Configuration:
        """Configuration with the same choice everywhere and the middle settings.

        Raises `ConfigurationError` off the ladders.
        """
        configuration = self.settled(Configuration.uniform(bits, rank, self.num_layers))
        self.validate(configuration)
        return configuration

    def uniforms(self) -> tuple[Configuration, ...]:
        """Every uniform configuration, by bits and then ranks, at the middle settings."""
        return tuple(self.uniform(bits, rank) for bits in self.bits for rank in self.ranks)

    def is_uniform(self, configuration: Configuration) -> bool:
        """Whether a configuration of the space has the same choice everywhere, at whatever settings."""
        return len(set(configuration.layers)) == 1 and configuration in self

    # Settings that all layers share

    @cached_property
    def middle(self) -> Shared:
        """The middle value of each setting, the lower one of two: where nothing is known of them."""
        return tuple((ladder.name, ladder.values[(len(ladder.values) - 1) // 2]) for ladder in self.shared)

    @cached_property
    def all_shared(self) -> tuple[Shared, ...]:
        """Every combination of settings; one empty one without ladders."""
        names = [ladder.name for ladder in self.shared]
        return tuple(
            tuple(zip(names, values, strict=True)) for values in itertools.product(*(s.values for s in self.shared))
        )

    @cached_property
    def spread_shared(self) -> tuple[Shared, ...]:
        """`spread_size` combinations in which each value of each setting is once at least."""
        size = spread_size(self.shared)
        return tuple(self.shared_at([n % len(ladder.values) for ladder in self.shared]) for n in range(size))

    def reseeded(self, shared: Shared, places: int) -> Shared:
        """The settings with the seed so many places on; as they are where seeds are not searched."""
        ladders = {ladder.name: ladder for ladder in self.shared}
        return tuple(
            (name, ladders[name].values[(ladders[name].index(value) + places) % len(ladders[name].values)])
            if name == REPLICATE
            else (name, value)
            for name, value in shared
        )

    def settled(self, configuration: Configuration, shared: Shared | None = None) -> Configuration:
        """The configuration if it has settings, else with the given ones, or the middle ones."""
        if configuration.shared or not self.shared:
            return configuration
        return Configuration(configuration.layers, self.middle if shared is None else shared)

    def shared_indices(self, configuration: Configuration) -> NDArray[np.int64]:
        """Place of each setting on its ladder, (S,); raises `ConfigurationError` off the ladders."""
        self._require_names(configuration)
        places = [ladder.index(value) for ladder, (_, value) in zip(self.shared, configuration.shared, strict=True)]
        return np.array(places, dtype=np.int64)

    def shared_at(self, indices: Sequence[int] | NDArray[np.int64]) -> Shared:
        """Settings at the given places (S,)."""
        return tuple((s.name, s.values[int(i)]) for s, i in zip(self.shared, indices, strict=True))

    def random_shared(self, rng: np.random.Generator) -> Shared:
        """Settings drawn uniformly; nothing is drawn without ladders."""
        return self.shared_at([int(rng.integers(len(ladder.values))) for ladder in self.shared])

    def shared_steps(self, configuration: Configuration) -> tuple[Configuration, ...]:
        """All configurations of which one setting is one edit away: a neighbour on a ladder, or another name."""
        places = self.shared_indices(configuration)
        found = []
        for column, ladder in enumerate(self.shared):
            for place in ladder.steps(int(places[column])):
                moved = places.copy()
                moved[column] = place
                found.append(Configuration(configuration.layers, self.shared_at(moved)))
        return tuple(found)

    def _require_names(self, configuration: Configuration) -> None:
        asked, given = [ladder.name for ladder in self.shared], [name for name, _ in configuration.shared]
        if asked != given:
            raise ConfigurationError(
                f"a configuration with {_listed(asked)} is needed, got one with {_listed(given)}: {configuration}"
            )

    def _shared_fits(self, configuration: Configuration) -> bool:
        try:
            self.shared_indices(configuration)
        except ConfigurationError:
            return False
        return True

    # Bits and ranks of the layers

    def ladder(self, knob: Knob) -> tuple[int, ...]:
        """The ladder of a knob."""
        return self.bits if knob == "bits" else self.ranks

    def __contains__(self, configuration: Configuration) -> bool:
        """Whether every layer's choice, and the settings, are on the ladders; a reference of the user's need not be."""
        if len(configuration) != self.num_layers or not all(c in self._positions for c in configuration.layers):
            return False
        return self._shared_fits(configuration)

    def validate(self, configuration: Configuration) -> None:
        """Raise `ConfigurationError` unless every layer's choice, and every setting, is on the ladders."""
        if len(configuration) != self.num_layers:
            raise ConfigurationError(
                f"a configuration of {self.num_layers} layers is needed, got one of {len(configuration)}"
            )
        for name, choice in zip(self.layer_names, configuration.layers, strict=True):
            if choice.bits not in self.bits:
                raise ConfigurationError(f"bits must be one of {self.bits}, got {choice.bits} for layer {name!r}")
            if choice.rank not in self.ranks:
                raise ConfigurationError(f"rank must be one of {self.ranks}, got {choice.rank} for layer {name!r}")
        self.shared_indices(configuration)

    def indices(self, configuration: Configuration) -> NDArray[np.int64]:
        """Ordinal index of each layer's choice on its ladder, (L, 2): bits, then rank; settings are not looked at."""
        if len(configuration) != self.num_layers:
            self.validate(configuration)
        try:
            pairs = [self._positions[choice] for choice in configuration.layers]
        except KeyError:
            self.validate(configuration)
            raise
        return np.array(pairs, dtype=np.int64)

    def from_indices(self, indices: NDArray[np.int64], shared: Shared = ()) -> Configuration:
        """Configuration at the given ordinal indices (L, 2), with these settings."""
        return Configuration(tuple(self._choices[i][j] for i, j in indices.tolist()), shared)

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
        """All configurations one atomic edit away: at most 4 L of them by a layer's choice, then those by a setting."""
        found = []
        for layer in range(self.num_layers):
            for knob in ("bits", "rank"):
                for direction in (-1, 1):
                    step = self.step(configuration, layer, knob, direction)
                    if step is not None:
                        found.append(step)
        return (*found, *self.shared_steps(configuration))

    def atomic_distance(self, a: Configuration, b: Configuration) -> int:
        """Smallest number of atomic edits from a to b (section 3.3)."""
        return int(np.abs(self.indices(a) - self.indices(b)).sum()) + self.shared_distance(a, b)

    def shared_distance(self, a: Configuration, b: Configuration) -> int:
        """Smallest number of edits of settings from a to b."""
        if a.shared == b.shared:
            return 0
        places = zip(self.shared, self.shared_indices(a), self.shared_indices(b), strict=True)
        return sum(ladder.distance(int(i), int(j)) for ladder, i, j in places)

    def embed(self, configuration: Configuration) -> NDArray[np.float64]:
        """Standardised ordinal embedding psi, (2L + columns of `embed_shared`,): all bits, all ranks, the settings.

        Each ladder index is standardised by the mean and standard deviation of its ladder's indices, so that the
        embedding of a configuration does not depend on what else was evaluated. A ladder of one rung embeds as 0.
        """
        indices = self.indices(configuration).astype(np.float64)
        columns = []
        for column, ladder in enumerate((self.bits, self.ranks)):
            rungs = np.arange(len(ladder), dtype=np.float64)
            columns.append((indices[:, column] - rungs.mean()) / (rungs.std() or 1.0))
        return np.concatenate([*columns, self.embed_shared(configuration)])

    def embed_shared(self, configuration: Configuration) -> NDArray[np.float64]:
        """Standardised embedding of the settings, empty without ladders.

        Numbers have a column of their standardised ordinal index, names one column each (one-hot), likewise
        standardised. A setting concerns every layer: its columns are sqrt(L) times as wide, so that a step of it is as
        far as the same step of all layers' bits.
        """
        columns: list[float] = []
        for ladder, place in zip(self.shared, self.shared_indices(configuration), strict=True):
            table = _standardised(ladder) * np.sqrt(self.num_layers)
            columns += table[int(place)].tolist()
        return np.array(columns, dtype=np.float64)

    def random(self, rng: np.random.Generator) -> Configuration:
        """Configuration drawn uniformly from the space, feasible or not."""
        bits = rng.integers(len(self.bits), size=self.num_layers)
        ranks = rng.integers(len(self.ranks), size=self.num_layers)
        return self.from_indices(np.stack([bits, ranks], axis=1), self.random_shared(rng))


def _standardised(ladder: SharedLadder) -> NDArray[np.float64]:
    """Embedding of each value of a ladder, (rungs, columns): distances between names are all the same."""
    size = len(ladder.values)
    if ladder.ordinal:
        rungs = np.arange(size, dtype=np.float64)[:, None]
        return np.asarray((rungs - rungs.mean()) / (rungs.std() or 1.0))
    return np.asarray((np.eye(size) - 1 / size) / np.sqrt(1 - 1 / size)) if size > 1 else np.zeros((1, 1))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "no shared settings"
