"""The small commands, which need no torch: `qratk components` and `qratk gain`."""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qratk.components import REGISTRIES
from qratk.core.errors import PluginError, RunDirectoryError, UnknownComponentError
from qratk.core.memory import format_bytes
from qratk.registry import REQUIRED, Option, Registry
from qratk.run import files


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


def gain(arguments: Sequence[str]) -> int:
    """Exit status of `qratk gain RUN [--bits B]`: what a finished search won over uniform configurations."""
    parser = argparse.ArgumentParser("qratk gain", description="Compare a search's best with uniform configurations.")
    parser.add_argument("run", type=Path, help="run directory of a finished search")
    parser.add_argument("--bits", type=int, default=4, help="bit-width of the uniform configurations (default 4)")
    given = parser.parse_args(arguments)
    print(gain_text(_result(given.run), given.bits))
    return 0


def gain_text(result: dict[str, Any], bits: int) -> str:
    """The best, and its gain in score over each uniform baseline of a bit-width, on validation and on test data."""
    best, tests = result["best"], result["test_scores"]
    lines = [f"best  {best['configuration']}: score {best['score']:.4f}, {format_bytes(best['bytes'])}"]
    for comparison in result["comparisons"]:
        baseline = comparison["baseline"]
        if not baseline["configuration"].startswith(f"{bits}:") or baseline["average_bits"] != bits:
            continue
        lines.append(
            f"  over uniform {baseline['configuration'].partition('*')[0]}: {comparison['difference']:+.4f} "
            f"[{comparison['low']:+.4f}, {comparison['high']:+.4f}] at {best['bytes'] / baseline['bytes']:.0%} "
            f"of its bytes"
        )
        both = [tests.get(row["configuration"], {}).get("score") for row in (best, baseline)]
        if None not in both:
            lines[-1] += f"; on test data {both[0] - both[1]:+.4f}"
    if len(lines) == 1:
        lines.append(f"  no uniform configuration of {bits} bits was measured")
    return "\n".join(lines)


def _result(run: Path) -> dict[str, Any]:
    path = run / files.RESULT
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunDirectoryError(f"{path} is missing: {run} holds no finished search") from None
    except ValueError as error:
        raise RunDirectoryError(f"{path} is not readable: {error}") from error
    return found
