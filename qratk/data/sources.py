"""Rows of a data set: JSON and JSON-lines files, globs of them, folders and hub names that `datasets` can load."""

from __future__ import annotations

import glob
import hashlib
import json
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qratk.core.errors import DataError

Source = str | Sequence[str]
FILE_SUFFIXES = (".json", ".jsonl", ".txt", ".csv", ".parquet")
_ON_HUB = "hf://"
_BUILDERS = {".csv": "csv", ".parquet": "parquet", ".txt": "text"}


@dataclass(frozen=True)
class Row:
    """One row and where it stands: `data/train.jsonl, line 3` or `tatsu-lab/alpaca [train], row 3`."""

    data: Mapping[str, Any]
    where: str

    def text(self, name: str, *, default: str | None = None) -> str:
        """Value of a text field; `default` when it is missing or null. Raises DataError otherwise."""
        value = self.data.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, str):
            return value
        raise self.error(f"needs a text field {name!r}, {_found(self.data, name)}")

    def error(self, message: str) -> DataError:
        """The error to raise about this row."""
        return DataError(f"{self.where}: the row {message}")


def shown(value: Any) -> str:
    """A value of a row for a message: short, whatever its size and depth."""
    brief = reprlib.Repr()
    brief.maxlevel, brief.maxlist, brief.maxdict, brief.maxstring, brief.maxother = 4, 12, 8, 80, 80
    return brief.repr(value)


def _found(data: Mapping[str, Any], name: str) -> str:
    if name not in data:
        return f"but has only {', '.join(map(shown, data)) or 'no fields'} (the option `rename` maps other names)"
    return f"but there it holds {shown(data[name])}"


def content_key(data: Any) -> str:
    """Digest of parsed content; equal content has equal keys. Raises UnicodeEncodeError for half a surrogate pair."""
    text = json.dumps(data, sort_keys=True, ensure_ascii=False, default=_plain)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _plain(value: Any) -> Any:
    """What JSON takes in the place of an object: what its `plain` says, else its text."""
    plain = getattr(value, "plain", None)
    return plain() if callable(plain) else str(value)


def read_rows(source: Source, split: str, *, rename: Mapping[str, str] | None = None) -> list[Row]:
    """Rows of every file or data set of a source, in order. Raises DataError when there is nothing to read.

    A text is a file, a glob, a file of a data set on the hub (`hf://datasets/OWNER/NAME/FILE`), or what
    `datasets.load_dataset` takes, written `path`, `path:name`, `path#split` or `path:name#split`; without `#split` the
    split's own name is asked for. `rename` maps our field names to the file's.
    """
    sources = [source] if isinstance(source, str | Path) else list(source)
    rows = [row for one in sources for row in _read_one(str(one), split)]
    if not rows:
        raise DataError(f"{split} data {', '.join(map(str, sources)) or '[]'}: there are no rows; give at least one")
    if rename:
        rows = [Row(_renamed(row.data, rename), row.where) for row in rows]
    return rows


def _renamed(data: Mapping[str, Any], rename: Mapping[str, str]) -> dict[str, Any]:
    return {**data, **{ours: data[theirs] for ours, theirs in rename.items() if theirs in data}}


def _read_one(source: str, split: str) -> Iterator[Row]:
    if source.startswith(_ON_HUB):
        return _load_dataset(source, _BUILDERS.get(Path(source).suffix, "json"), None, "train", data_files=source)
    try:
        path = Path(source).expanduser()
        files = [path] if path.is_file() else []
        if not files and any(character in source for character in "*?["):
            files = [Path(file) for file in sorted(glob.glob(str(path), recursive=True)) if Path(file).is_file()]
        missing = not files and _looks_like_path(source) and not path.is_dir()
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, with a null, of an unknown user's home
        raise DataError(f"{split} data: {source!r:.200} cannot be a file: {error}") from error
    if missing:
        raise DataError(f"{split} data: there is no file {source}; relative paths start at {Path.cwd()}")
    return (row for file in files for row in _read_file(file)) if files else _read_hub(source, split)


def _looks_like_path(source: str) -> bool:
    return "#" not in source and (source.endswith(FILE_SUFFIXES) or source.startswith(("/", "./", "../", "~")))


def _read_file(path: Path) -> Iterator[Row]:
    if path.suffix in (".csv", ".parquet"):
        return _load_dataset(str(path), path.suffix[1:], None, "train", data_files=str(path))
    try:
        text = path.read_text(encoding="utf-8-sig")  # a byte-order mark is no part of the text
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}); convert it first") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not text.strip():
        raise DataError(f"{path}: the file is empty; it must hold JSON rows")
    if path.suffix == ".txt":
        return iter([Row({"text": text}, str(path))])
    if path.suffix == ".json" and text.lstrip().startswith("["):
        return _rows_of_list(text, path)
    return _rows_of_lines(text, path)


def _rows_of_list(text: str, path: Path) -> Iterator[Row]:
    for index, value in enumerate(_parsed(text, str(path))):
        yield _row(value, f"{path}, element {index}")


def _rows_of_lines(text: str, path: Path) -> Iterator[Row]:
    advice = "; a file holds one JSON object a line, or one list of objects when its name ends in .json"
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines() also cuts at U+2028 inside strings
        if line.strip():
            where = f"{path}, line {number}"
            yield _row(_parsed(line.removeprefix("\ufeff"), where, number, advice), where)


def _parsed(text: str, where: str, line: int | None = None, advice: str = "") -> Any:
    """A JSON value. Raises DataError that names where it stands; of a whole file, the line."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = where if line is not None else f"{where}, line {error.lineno}"
        raise DataError(f"{place}: not valid JSON ({error.msg}){advice}") from error
    except RecursionError as error:
        raise DataError(f"{where}: nested too deeply to be read") from error
    except ValueError as error:  # a number of more digits than Python converts
        raise DataError(f"{where}: cannot be read ({str(error).partition(';')[0]})") from error


def _row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where}: a row must be a JSON object, got {shown(value)}")
    return Row(value, where)


def _read_hub(source: str, split: str) -> Iterator[Row]:
    rest, _, part = source.partition("#")
    path, _, name = rest.partition(":")
    return _load_dataset(source, path, name or None, part or split)


def _load_dataset(source: str, path: str, name: str | None, split: str, **options: Any) -> Iterator[Row]:
    from datasets import load_dataset, load_from_disk

    try:
        if (Path(path) / "dataset_dict.json").is_file():
            data: Iterable[Any] = load_from_disk(path)[split]
        elif (Path(path) / "state.json").is_file():
            data = load_from_disk(path)
        else:
            data = load_dataset(path, name, split=split, **options)
    except Exception as error:  # the library raises a dozen kinds: not found, offline, no such split, bad parse
        raise DataError(
            f"{source}: neither a file nor a data set that can be loaded (split {split!r}): "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error
    for index, value in enumerate(data):
        yield Row(dict(value), f"{source} [{split}], row {index}")
