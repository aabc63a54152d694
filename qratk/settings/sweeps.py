"""Sweeps: one setting of the search at a time, each value an overlay over a base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qratk.core.errors import ConfigurationError
from qratk.settings.names import SLOTS
from qratk.settings.reading import read_settings

_PREFIX: Final = "sweep-"


@dataclass(frozen=True)
class SweepPoint:
    """A value of a setting, as a figure shows it; the setting with dotted keys, as in "searcher.nsga2.offspring"."""

    setting: str
    value: str

    @property
    def option(self) -> str:
        """The setting without what it is an option of."""
        return self.setting.rpartition(".")[2]

    @property
    def name(self) -> str:
        """The recipe's: sweep-OPTION-VALUE."""
        return f"{_PREFIX}{self.option}-{self.value}"

    @classmethod
    def of_name(cls, name: str) -> SweepPoint | None:
        """What the name of a recipe says, which is all that comparisons of before kept; None for other names."""
        setting, dash, value = name.removeprefix(_PREFIX).partition("-")
        return cls(setting, value) if name.startswith(_PREFIX) and dash else None


@dataclass(frozen=True)
class SweptRecipe:
    """A point of a sweep, and the overlay that sets it."""

    point: SweepPoint
    document: Mapping[str, Any]


def read_sweeps(path: Path) -> tuple[SweptRecipe, ...]:
    """Every point of a file {setting: [values]}, with names of their own; raises `ConfigurationError`.

    A setting is one of the search, or `slot.component.option`. A value is plain, or {name: settings of the search}.
    """
    found: dict[str, SweptRecipe] = {}
    for setting, values in read_settings(path).items():
        if not isinstance(values, list) or not values:
            raise ConfigurationError(f"{path}: a sweep is {{setting: [values]}}, got {setting}: {values!r}")
        for point, section in _overlays(str(setting), values, path):
            if point.name in found:
                raise ConfigurationError(f"{path}: {point.name} is there twice")
            found[point.name] = SweptRecipe(point, {"search": {"name": point.name, **section}})
    return tuple(found.values())


def _overlays(setting: str, values: list[Any], path: Path) -> Iterator[tuple[SweepPoint, dict[str, Any]]]:
    for value in values:
        if not isinstance(value, Mapping):
            yield SweepPoint(setting, str(value)), _section(setting, value, path)
            continue
        for name, section in value.items():
            if not isinstance(section, Mapping):
                raise ConfigurationError(f"{path}: {setting}: {name} must hold settings of the search, got {section!r}")
            yield SweepPoint(setting, str(name)), dict(section)


def _section(setting: str, value: Any, path: Path) -> dict[str, Any]:
    slot, *inner = setting.split(".")
    if not inner:
        return {slot: value}
    if slot not in SLOTS or len(inner) != 2:
        raise ConfigurationError(f"{path}: {setting!r} is neither a setting of the search nor 'slot.component.option'")
    component, option = inner
    return {slot: {"class_path": component, "init_args": {option: value}}}
