"""Configurations and recipes that travel with the package, by name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import qratk
from qratk.core.errors import ConfigurationError
from qratk.core.text import nearest

_PACKAGE: Final = Path(qratk.__file__).parent
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]+")
_SUFFIXES: Final = (".yaml", ".yml", ".json")


def root() -> Path:
    """The folder of the shipped files: within an installed package, else beside it in the repository."""
    inside = _PACKAGE / "configs"
    return inside if inside.is_dir() else _PACKAGE.parent / "configs"


def configurations() -> dict[str, Path]:
    """Name of every shipped file, its stem, and where it is; those of the top folder first."""
    found = sorted(root().rglob("*.yaml"), key=lambda path: (len(path.parts), path))
    return {path.stem: path for path in reversed(found)}


def configuration(given: str) -> str:
    """Path of a configuration: the given one when it is a path, else that of the shipped file of this name.

    A file of the working directory goes before a name. Raises `ConfigurationError` for an unknown name; what looks
    like a path is left to the one who opens it.
    """
    if not _is_name(given):
        return given
    known = configurations()
    if given not in known:
        top = [name for name, path in known.items() if path.parent == root()]
        raise ConfigurationError(
            f"there is no file {given!r} and no configuration of this name; known are {', '.join(sorted(top))}, "
            f"and the recipes {', '.join(sorted(set(known) - set(top)))}{nearest(given, known)}"
        )
    return str(known[given])


def recipes(given: Sequence[str]) -> list[Path]:
    """Paths of recipes: files, shipped names, and all files of a folder, also of a shipped one such as `baselines`."""
    found: list[Path] = []
    for name in given:
        folder = Path(name) if Path(name).is_dir() else root() / name
        if folder.is_dir() and (Path(name).is_dir() or _is_name(name)):
            found += sorted(folder.glob("*.yaml"))
        else:
            found.append(Path(configuration(name)))
    return found


def with_paths(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments with the names after `--config` replaced by paths."""
    resolved: list[str] = []
    for position, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option == "--config" and equals:
            resolved.append(f"--config={configuration(value)}")
        elif position and arguments[position - 1] == "--config":
            resolved.append(configuration(argument))
        else:
            resolved.append(argument)
    return resolved


def files_of(arguments: Sequence[str]) -> list[Path]:
    """The files after `--config` that are there; settings may also be given in place of a file."""
    pairs = zip(["", *arguments], arguments, strict=False)
    given = [value for option, value in pairs if option == "--config"]
    given += [text.removeprefix("--config=") for text in arguments if text.startswith("--config=")]
    return [Path(value) for value in given if _is_file(value)]


def _is_file(given: str) -> bool:
    try:
        return Path(given).is_file()
    except OSError:  # settings in place of a file, which are too long for a name
        return False


def _is_name(given: str) -> bool:
    return bool(_NAME.fullmatch(given)) and not given.endswith(_SUFFIXES) and not _is_file(given)
