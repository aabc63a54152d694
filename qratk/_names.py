"""Short names of components in configuration files and on the command line.

jsonargparse resolves classes by import path, or by class name once their module is imported. Our registries know more:
third-party names, and errors that list what is known. So names become import paths before jsonargparse sees them, here
and nowhere else: in files through a loader (`load_document`), on the command line through `resolve_arguments`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

import yaml

from qratk.components import REGISTRIES
from qratk.core.errors import PluginError
from qratk.recipe import RECIPE, SLOTS

SECTION: Final = "search"
_ARGUMENT = re.compile(
    r"--" + SECTION + r"(?:\.(?P<slot>\w+)(?P<suffix>\.class_path|\.help|\+)?)?(?:=(?P<value>.*))?", re.S
)


def resolve_component(kind: str, given: Any) -> Any:
    """The component of an open set with its name replaced by an import path; lists are resolved item by item.

    Takes a name, `{class_path: name, init_args: {...}}` or a list of these. Import paths (with a dot) and whatever else
    is given stay as they are, for jsonargparse to judge. Raises `UnknownComponentError` or `PluginError`.
    """
    if isinstance(given, str):
        return given if "." in given else REGISTRIES[kind].class_path(given)
    if isinstance(given, list | tuple):
        return [resolve_component(kind, item) for item in given]
    if isinstance(given, dict) and isinstance(given.get("class_path"), str):
        return {**given, "class_path": resolve_component(kind, given["class_path"])}
    return given


def resolve_section(section: Any) -> Any:
    """The search section with every component resolved."""
    if not isinstance(section, dict):
        return section
    return {key: resolve_component(SLOTS[key], value) if key in SLOTS else value for key, value in section.items()}


def resolve_document(document: Any, commands: Sequence[str] = ()) -> Any:
    """A whole configuration with its search section resolved, also below the names of commands."""
    if not isinstance(document, dict):
        return document
    if any(key in commands and isinstance(value, dict) and SECTION in value for key, value in document.items()):
        return {key: resolve_document(value) if key in commands else value for key, value in document.items()}
    return {key: resolve_section(value) if key == SECTION else value for key, value in document.items()}


def resolve_arguments(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments with the names in `--search.<component>` resolved, inline, or in the file they name."""
    resolved: list[str] = []
    waiting: str | None = None  # the slot whose value is the next argument
    for argument in arguments:
        if waiting is not None:
            resolved.append(argument if argument.startswith("--") else _resolve_text(waiting, argument))
            waiting = None
            continue
        match = _ARGUMENT.fullmatch(argument)
        slot = None if match is None else (match["slot"] or SECTION)
        if match is None or slot not in {*SLOTS, SECTION}:
            resolved.append(argument)
        elif match["value"] is None:
            waiting = slot
            resolved.append(argument)
        else:
            resolved.append(argument[: match.start("value")] + _resolve_text(slot, match["value"]))
    return resolved


def defaults() -> dict[str, Any]:
    """The published recipe as values of the search section: one `{class_path: ...}` for each component."""
    chosen: dict[str, Any] = {}
    for slot, names in RECIPE.items():
        registry = REGISTRIES[SLOTS[slot]]
        if isinstance(names, str):
            chosen[slot] = {"class_path": registry.class_path(names)}
        else:
            chosen[slot] = [{"class_path": registry.class_path(name)} for name in names]
    return chosen


def option_hint(class_path: str, given: str) -> str:
    """What options the component with an import path has, as the end of an error message."""
    for registry in REGISTRIES.values():
        for name in registry.names():
            with suppress(PluginError):
                if registry.class_path(name) == class_path:
                    known = [option.name for option in registry.options(name)]
                    return f"; the options of {name!r} are {', '.join(known) or 'none'}" + nearest(given, known)
    return ""


def nearest(given: str, known: Sequence[str]) -> str:
    """A suggestion as the end of an error message; empty when nothing is near."""
    near = get_close_matches(given, known, n=1)
    return f". Did you mean {near[0]!r}?" if near else ""


def _resolve_text(slot: str, text: str) -> str:
    path = Path(text)
    try:
        is_file = path.suffix in {".yaml", ".yml", ".json"} and path.is_file()
        value = yaml.safe_load(path.read_text(encoding="utf-8") if is_file else text)
    except (OSError, yaml.YAMLError):
        return text  # jsonargparse says what is wrong with it
    resolved = resolve_section(value) if slot == SECTION else resolve_component(SLOTS[slot], value)
    if resolved == value and not is_file:
        return text
    return resolved if isinstance(resolved, str) else json.dumps(resolved)
