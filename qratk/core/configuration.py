"""A configuration: the bit-width and the adapter rank of every layer (Eq. 1), and settings that all layers share."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from qratk.core.errors import ConfigurationError
from qratk.core.shared import Setting, Shared, shared_from_text, shared_of, shared_text

Knob = Literal["bits", "rank"]
KNOBS: tuple[Knob, Knob] = ("bits", "rank")

_RUN = re.compile(r"(\d+):(\d+)(?:\*(\d+))?")


@dataclass(frozen=True, order=True, slots=True)
class LayerChoice:
    """Bit-width of a layer's frozen weights (16 = compute dtype) and rank of its adapter (0 = none)."""

    bits: int
    rank: int

    def __str__(self) -> str:
        return f"{self.bits}:{self.rank}"


@dataclass(frozen=True, order=True)
class Configuration:
    """One `LayerChoice` a layer, in model order; hashable, ordered, with a stable text form and digest.

    `shared` are options of the trained module that concern all layers, such as the learning rate, by name; where there
    are none, those of the module itself hold. They change no bytes.
    """

    layers: tuple[LayerChoice, ...]
    shared: Shared = ()

    def __post_init__(self) -> None:
        if self.shared:
            object.__setattr__(self, "shared", shared_of(self.shared))

    @classmethod
    def of(cls, bits: Sequence[int], ranks: Sequence[int]) -> Configuration:
        """Configuration with the given bits (L,) and ranks (L,)."""
        if len(bits) != len(ranks):
            raise ConfigurationError(f"as many bits as ranks are needed, got {len(bits)} and {len(ranks)}")
        return cls(tuple(LayerChoice(int(b), int(r)) for b, r in zip(bits, ranks, strict=True)))

    @classmethod
    def uniform(cls, bits: int, rank: int, num_layers: int) -> Configuration:
        """Configuration that gives every layer the same choice."""
        return cls((LayerChoice(bits, rank),) * num_layers)

    @classmethod
    def from_text(cls, text: str) -> Configuration:
        """Configuration written by `str`: `bits:rank` a layer, `*n` for n equal layers in a row.

        Settings follow after a bar, as in `4:8*3 2:16 | learning_rate=0.0004 rslora=true`.
        """
        layers: list[LayerChoice] = []
        choices, bar, settings = text.partition("|")
        shared = shared_from_text(settings)
        if bar and not shared:
            raise ConfigurationError(f"no setting follows the bar of {text!r}; give one, or leave the bar out")
        for word in choices.split():
            match = _RUN.fullmatch(word)
            if match is None:
                raise ConfigurationError(
                    f"{word!r} is not of the form bits:rank or bits:rank*count, as in '4:8*3 2:16'"
                )
            bits, rank, count = int(match[1]), int(match[2]), int(match[3] or 1)
            layers += [LayerChoice(bits, rank)] * count
        return cls(tuple(layers), shared)

    def __str__(self) -> str:
        words: list[str] = []
        start = 0
        for stop in range(1, len(self.layers) + 1):
            if stop == len(self.layers) or self.layers[stop] != self.layers[start]:
                count = stop - start
                words.append(f"{self.layers[start]}" + (f"*{count}" if count > 1 else ""))
                start = stop
        return " ".join(words) + (f" | {shared_text(self.shared)}" if self.shared else "")

    def __len__(self) -> int:
        return len(self.layers)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # Kept: configurations are the keys of every archive, and hashing 100 layers anew each time adds up.
        return hash((self.layers, self.shared) if self.shared else self.layers)

    @cached_property
    def bits(self) -> tuple[int, ...]:
        """Bit-width of each layer, (L,)."""
        return tuple(layer.bits for layer in self.layers)

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """Adapter rank of each layer, (L,)."""
        return tuple(layer.rank for layer in self.layers)

    @cached_property
    def digest(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of the text form: a name for files and tables."""
        return hashlib.sha256(str(self).encode()).hexdigest()[:16]

    def replace(self, layer: int, *, bits: int | None = None, rank: int | None = None) -> Configuration:
        """Configuration with another choice at one layer, and the same settings."""
        old = self.layers[layer]
        new = LayerChoice(old.bits if bits is None else bits, old.rank if rank is None else rank)
        return Configuration((*self.layers[:layer], new, *self.layers[layer + 1 :]), self.shared)

    @cached_property
    def settings(self) -> Mapping[str, Setting]:
        """The shared settings by name."""
        return dict(self.shared)

    def with_shared(self, shared: Mapping[str, Setting] | Shared) -> Configuration:
        """Configuration with the same choices, and these settings in place of its own."""
        return Configuration(self.layers, shared_of(shared))


def unique(configurations: Iterable[Configuration]) -> tuple[Configuration, ...]:
    """The configurations in order, without repeats."""
    return tuple(dict.fromkeys(configurations))
