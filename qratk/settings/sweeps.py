"""Sweeps: one setting of the search at a time, each value an overlay over a base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from qratk.core.errors import ConfigurationError
from qratk.settings.names import SLOTS
from qratk.settings.reading import read_settings

PREFIX: Final = "sweep-"


def read_sweeps(path: Path) -> dict[str, dict[str, Any]]:
    """Overlays by name, sweep-SETTING-VALUE, of a file {setting: [values]}; raises `ConfigurationError`.

    A setting is one of the search, or `slot.component.option`. A value is plain, or {name: settings of the search}.
    """
    found: dict[str, dict[str, Any]] = {}
    for setting, values in read_settings(path).items():
        if not isinstance(values, list) or not values:
            raise ConfigurationError(f"{path}: a sweep is {{setting: [values]}}, got {setting}: {values!r}")
        for name, section in _overlays(str(setting), values, path):
            if name in found:
                raise ConfigurationError(f"{path}: {name} is there twice")
            found[name] = {"search": {"name": name, **section}}
    return found


def _overlays(setting: str, values: list[Any], path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    short = setting.rpartition(".")[2]
    for value in values:
        if not isinstance(value, Mapping):
            yield f"{PREFIX}{short}-{value}", _section(setting, value, path)
            continue
        for name, section in value.items():
            if not isinstance(section, Mapping):
                raise ConfigurationError(f"{path}: {setting}: {name} must hold settings of the search, got {section!r}")
            yield f"{PREFIX}{short}-{name}", dict(section)


def _section(setting: str, value: Any, path: Path) -> dict[str, Any]:
    slot, *inner = setting.split(".")
    if not inner:
        return {slot: value}
    if slot not in SLOTS or len(inner) != 2:
        raise ConfigurationError(f"{path}: {setting!r} is neither a setting of the search nor 'slot.component.option'")
    component, option = inner
    return {slot: {"class_path": component, "init_args": {option: value}}}
