"""`qratk components`: what can be chosen, with options and packages; needs no torch."""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qratk.components import REGISTRIES
from qratk.core.errors import PluginError, UnknownComponentError
from qratk.registry import REQUIRED, Option, Registry


@dataclass(frozen=True)
class ComponentRow:
    """What is told of one strategy; `problem` says why it cannot be used, and is empty when it can."""

    kind: str
    name: str
    owner: str
    summary: str
    options: dict[str, str]
    problem: str = ""


def rows(registry: Registry[Any]) -> tuple[ComponentRow, ...]:
    """One row a name of a registry; a plugin that cannot be loaded gets a row that says so."""
    return tuple(_row(registry, name) for name in registry.names())


def components(arguments: Sequence[str]) -> int:
    """Exit status of `qratk components [KIND] [--json]`."""
    parser = argparse.ArgumentParser("qratk components", description="List the strategies of the open sets.")
    parser.add_argument("kind", nargs="?", help=f"one of {', '.join(REGISTRIES)}")
    parser.add_argument("--json", action="store_true", help="for machines")
    given = parser.parse_args(arguments)
    if given.kind is not None and given.kind not in REGISTRIES:
        raise UnknownComponentError(f"there is no open set {given.kind!r}; known are {', '.join(REGISTRIES)}")
    kinds = [given.kind] if given.kind else list(REGISTRIES)
    found = [row for kind in kinds for row in rows(REGISTRIES[kind])]
    print(json.dumps([asdict(row) for row in found], indent=2) if given.json else _text(found))
    return 0


def _row(registry: Registry[Any], name: str) -> ComponentRow:
    try:
        summary = (inspect.getdoc(registry.get(name)) or "").partition("\n")[0]
        options = {option.name: _option(option) for option in registry.options(name)}
    except PluginError as error:
        return ComponentRow(registry.kind, name, registry.owner(name), "", {}, str(error))
    return ComponentRow(registry.kind, name, registry.owner(name), summary, options)


def _option(option: Option) -> str:
    annotation = option.annotation or "any"
    return f"{annotation} (required)" if option.default is REQUIRED else f"{annotation} = {option.default!r}"


def _text(found: Sequence[ComponentRow]) -> str:
    lines: list[str] = []
    kind = ""
    for row in found:
        if row.kind != kind:
            kind = row.kind
            lines += ["", kind] if lines else [kind]
        owner = "" if row.owner == "qratk" else f"  [{row.owner}]"
        lines.append(f"  {row.name}{owner}  {row.problem or row.summary}")
        lines += [f"      {name}: {text}" for name, text in row.options.items()]
    return "\n".join(lines)
