"""Folders and files that are as they were written: digests beside the files, and what shows damage when they are read.

A folder that others read as it is keeps its digests in `SHA256SUMS`, which `sha256sum --check` also takes.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from pathlib import Path
from typing import Final

from qratk.core.errors import ConfigurationError

SUMS: Final = "SHA256SUMS"

_CURE: Final = f"write the folder anew, or copy it again; if you changed it yourself, delete its {SUMS}"
_OTHER: Final = "take an earlier checkpoint, or fit again"


def write_sums(folder: Path) -> None:
    """Write the digests of all files below a folder; raises `OSError`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / SUMS)
    lines = [f"{_digest(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def require_intact(folder: str | Path) -> Path:
    """The folder, all of whose files are as `SHA256SUMS` says; one without that file passes.

    Raises `ConfigurationError` that names the file when one differs, is missing or cannot be read.
    """
    folder = Path(folder)
    sums = folder / SUMS
    if not sums.exists():
        return folder
    try:
        lines = sums.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{sums} is damaged: it cannot be read ({error}); {_CURE}") from error
    for line in lines:
        digest, _, name = line.partition("  ")
        _require_digest(folder / name, digest, sums)
    return folder


def require_intact_archive(path: Path) -> None:
    """Raise `ConfigurationError` when a zip archive, such as torch's checkpoints, holds damaged bytes.

    Every part of an archive carries its CRC-32, which torch does not look at. A file that is no archive passes.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, ValueError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ConfigurationError(f"{path} is damaged: {error}; {_OTHER}") from error
    if damaged is not None:
        raise ConfigurationError(f"{path} is damaged: its part {damaged!r} differs from its checksum; {_OTHER}")


def _require_digest(path: Path, digest: str, sums: Path) -> None:
    try:
        found = _digest(path)
    except (OSError, ValueError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise ConfigurationError(f"{path} {reason}, but {sums.name} beside it lists it; {_CURE}") from error
    if found != digest:
        raise ConfigurationError(f"{path} is damaged: it differs from its digest in {sums.name}; {_CURE}")


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
