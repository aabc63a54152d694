"""`qratk export`: what was found, in a form that other tools take; the help needs no torch."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qratk.core.errors import ExportError, PluginError
from qratk.core.memory import format_bytes
from qratk.exporters.base import Exporter, exporters, require_free
from qratk.registry import REQUIRED, Option

if TYPE_CHECKING:
    from qratk.backbone.backbone import Backbone

_HEAD: Final = ("form", "what reads it", "weights", "adapters", "equal to what was scored")


def export(arguments: Sequence[str]) -> int:
    """Exit status of `qratk export SOURCE --form NAME OUT`."""
    parser = _parser()
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--form")
    form = first.parse_known_args(arguments)[0].form
    if form is not None:
        _add_options(parser, form)
    asked = parser.parse_args(arguments)
    options = {option.name: getattr(asked, f"option_{option.name}") for option in exporters.options(asked.form)}
    exporter = exporters.create(asked.form, **{k: v for k, v in options.items() if v is not REQUIRED})
    require_free(asked.out)

    from qratk.cli.parser import prepare_parsing
    from qratk.cli.source import source_of

    prepare_parsing()
    backbone = source_of(asked.source, adapter=asked.adapter, settings=asked.config).backbone()
    _write(exporter, backbone, asked.out)
    return 0


def _write(exporter: Exporter, backbone: Backbone, out: Path) -> None:
    """Write, say what was written, and compare it with the model; raises `ExportError` where they differ."""
    from qratk.exporters.selfcheck import self_check

    folder = exporter.export(backbone, out)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {format_bytes(size)} for {exporter.takes}")
    for line in exporter.notes(backbone):
        print(f"note: {line}")
    found = self_check(exporter, backbone, folder)
    if found is None:
        print("self-check: none for this form and model")
        return
    print(f"self-check: {found}")
    if not found.passed:
        raise ExportError(
            f"{folder} was written, and is not what was scored: {found}. Nothing was deleted; report this with the "
            "configuration, or export another form"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "qratk export",
        usage="qratk export SOURCE --form NAME [options of the form] OUT",
        description="Write a configuration with its adapters, as they were scored, in a form that other tools take, "
        "and compare what was written with the model.",
        epilog=_forms_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", type=Path, help="folder of a finished run, its best.yaml, or a fit's checkpoint")
    parser.add_argument("out", type=Path, help="folder to be made; one that holds something is refused")
    parser.add_argument("--form", required=True, help=f"one of {', '.join(exporters.names())}")
    parser.add_argument("--adapter", type=Path, help="PEFT folder, for a file of settings without one beside it")
    parser.add_argument("--config", type=Path, help="settings of a checkpoint, by default the config.yaml above it")
    return parser


def _add_options(parser: argparse.ArgumentParser, form: str) -> None:
    """Add the constructor options of a form, which name it as any component."""
    group = parser.add_argument_group(f"options of {form}")
    for option in exporters.options(form):
        flags, kind = [f"--{option.name.replace('_', '-')}"], _kind(option)
        if isinstance(option.default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        shown = "" if option.default is REQUIRED else f" (default {option.default})"
        group.add_argument(
            *flags, dest=f"option_{option.name}", default=option.default, help=f"{option.annotation}{shown}", **kind
        )


def _kind(option: Option) -> dict[str, Any]:
    for kind in (int, float):
        if type(option.default) is kind or option.annotation.split(" ")[0] == kind.__name__:
            return {"type": kind}
    return {"type": str}


def _forms_text() -> str:
    """Every form with what it can hold and its options."""
    lines = ["forms:"]
    for name in exporters.names():
        try:
            exporter = exporters.create(name)
            holds = exporter.holds
            told = [
                ("for", exporter.takes),
                ("weights", holds.weights),
                ("adapters", holds.adapters),
                ("equal", holds.equality),
            ]
            flags = " ".join(f"--{o.name.replace('_', '-')}" for o in exporters.options(name))
            told += [("options", flags)] if flags else []
        except PluginError as error:
            told = [("problem", str(error))]
        lines.append(f"  {name}")
        for key, text in told:
            indent = " " * 16
            lines.append(textwrap.fill(text, 110, initial_indent=f"      {key:<10}", subsequent_indent=indent))
    return "\n".join(lines)


def forms_table() -> str:
    """The forms of this package with what each can hold, as a table in Markdown."""
    rows = [_HEAD, ("---",) * len(_HEAD)]
    for name in exporters.names():
        if exporters.owner(name) != "qratk":
            continue
        exporter = exporters.create(name)
        holds = exporter.holds
        rows.append((f"`{name}`", exporter.takes, holds.weights, holds.adapters, holds.equality))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"
