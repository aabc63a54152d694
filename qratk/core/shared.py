"""Global settings of a configuration: options of the trained module that concern all layers, and their ladders."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from qratk.core.errors import ConfigurationError

Setting = bool | int | float | str
"""A value of an option: a number, true or false, or a name."""
Shared = tuple[tuple[str, Setting], ...]
"""Options by name, sorted."""

REPLICATE: Final = "replicate"
"""The setting that numbers seeds: of the order of the training rows, of adapters and of dropout."""

_NAME = re.compile(r"[A-Za-z_]\w*")
_WORD = re.compile(r"[A-Za-z_][\w.-]*")
_TRUTH = {"true": True, "false": False}


def shared_of(given: Mapping[str, Setting] | Sequence[tuple[str, Setting]]) -> Shared:
    """Settings in the one form that equal settings have: sorted by name, whole numbers as integers.

    Raises `ConfigurationError` for a name or value that text cannot hold, and for a name that comes twice.
    """
    pairs = list(given.items() if isinstance(given, Mapping) else given)
    if len({name for name, _ in pairs}) < len(pairs):
        raise ConfigurationError(f"a setting is given once; got {', '.join(name for name, _ in pairs)}")
    for name, _ in pairs:
        if not _NAME.fullmatch(name):
            raise ConfigurationError(f"{name!r} is no name of an option, as in learning_rate")
    return tuple(sorted((name, _plain(name, value)) for name, value in pairs))


def _plain(name: str, value: Setting) -> Setting:
    if isinstance(value, bool | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return int(value) if value.is_integer() and abs(value) < 2**53 else value
    if isinstance(value, str) and _WORD.fullmatch(value) and value.lower() not in _TRUTH:
        return value
    raise ConfigurationError(f"{name}: {value!r} is neither a finite number, nor true or false, nor a name")


def shared_text(shared: Shared) -> str:
    """Settings as `name=value`, with blanks between; `shared_from_text` reads them."""
    return " ".join(f"{name}={setting_text(value)}" for name, value in shared)


def setting_text(value: Setting) -> str:
    """A value as text: true and false as YAML has them."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def shared_from_text(text: str) -> Shared:
    """Settings written by `shared_text`; raises `ConfigurationError`."""
    pairs = []
    for word in text.split():
        name, equals, value = word.partition("=")
        if not equals:
            raise ConfigurationError(f"{word!r} is not of the form name=value, as in 'learning_rate=0.001'")
        pairs.append((name, _read(value)))
    return shared_of(pairs)


def _read(text: str) -> Setting:
    if text.lower() in _TRUTH:
        return _TRUTH[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


@dataclass(frozen=True)
class SharedLadder:
    """The values that one setting may take: ascending numbers, or different names (or true and false) without an order.

    Raises `ConfigurationError` for a ladder that is neither.
    """

    name: str
    values: tuple[Setting, ...]

    def __post_init__(self) -> None:
        read = (_read(v) if isinstance(v, str) else v for v in self.values)  # YAML takes 1e-3 for text
        values = tuple(value for v in read for _, value in shared_of([(self.name, v)]))
        object.__setattr__(self, "values", values)
        numbers = [v for v in values if not isinstance(v, bool | str)]
        ascending = all(a < b for a, b in itertools.pairwise(numbers))
        if not values or len(set(map(repr, values))) < len(values) or not ascending or 0 < len(numbers) < len(values):
            raise ConfigurationError(
                f"{self.name} must be an ascending ladder of numbers, as in [0.001, 0.003, 0.01], or a list of "
                f"different names, as in [linear, cosine]; got {list(self.values)}"
            )

    @property
    def ordinal(self) -> bool:
        """Whether the values have an order, in which a step leads to a neighbour; seeds are numbers without one."""
        return not isinstance(self.values[0], bool | str) and self.name != REPLICATE

    def index(self, value: Setting) -> int:
        """Place of a value; raises `ConfigurationError` when it is not on the ladder."""
        for place, own in enumerate(self.values):
            if own == value and isinstance(own, bool) == isinstance(value, bool):
                return place
        raise ConfigurationError(f"{self.name} must be one of {list(self.values)}, got {value!r}")

    def steps(self, place: int) -> tuple[int, ...]:
        """Places one edit away: the neighbours of a number, every other one of names."""
        return tuple(other for other in range(len(self.values)) if self.distance(place, other) == 1)

    def distance(self, a: int, b: int) -> int:
        """Edits between two places: rungs between numbers, 1 between names."""
        return abs(a - b) if self.ordinal else int(a != b)


def shared_ladders(given: Mapping[str, Sequence[Setting]] | None) -> tuple[SharedLadder, ...]:
    """Ladders of settings by name, sorted; raises `ConfigurationError`."""
    return tuple(SharedLadder(name, tuple(values)) for name, values in sorted((given or {}).items()))


def spread_size(ladders: Sequence[SharedLadder]) -> int:
    """Values of the longest ladder; that of the seeds does not count: it goes round as far as the others need."""
    return max((len(ladder.values) for ladder in ladders if ladder.name != REPLICATE), default=1)
