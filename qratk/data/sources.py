"""Rows of a data set: JSON and JSON-lines files, globs of them, folders and hub names that `datasets` can load."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qratk.core.errors import DataError

Source = str | Sequence[str]
FILE_SUFFIXES = (".json", ".jsonl", ".txt", ".csv", ".parquet")


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


def _found(data: Mapping[str, Any], name: str) -> str:
    if name not in data:
        return f"but has only {', '.join(map(repr, data)) or 'no fields'} (the option `rename` maps other names)"
    return f"but there it holds {data[name]!r:.80}"


def content_key(data: Any) -> str:
    """Digest of parsed content; equal content has equal keys."""
    text = json.dumps(data, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def read_rows(source: Source, split: str, *, rename: Mapping[str, str] | None = None) -> list[Row]:
    """Rows of every file or data set of a source, in order. Raises DataError when there is nothing to read.

    A text is a file, a glob, or what `datasets.load_dataset` takes, written `path`, `path:name`, `path#split` or
    `path:name#split`; without `#split` the split's own name is asked for. `rename` maps our field names to the file's.
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
    path = Path(source).expanduser()
    if path.is_file():
        return _read_file(path)
    if any(character in source for character in "*?["):
        files = sorted(file for file in glob.glob(str(path), recursive=True) if Path(file).is_file())
        if files:
            return (row for file in files for row in _read_file(Path(file)))
    if _looks_like_path(source) and not path.is_dir():
        raise DataError(f"{split} data: there is no file {source}; relative paths start at {Path.cwd()}")
    return _read_hub(source, split)


def _looks_like_path(source: str) -> bool:
    return "#" not in source and (source.endswith(FILE_SUFFIXES) or source.startswith(("/", "./", "../", "~")))


def _read_file(path: Path) -> Iterator[Row]:
    if path.suffix in (".csv", ".parquet"):
        return _load_dataset(str(path), path.suffix[1:], None, "train", data_files=str(path))
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}); convert it first") from error
    if not text.strip():
        raise DataError(f"{path}: the file is empty; it must hold JSON rows")
    if path.suffix == ".txt":
        return iter([Row({"text": text}, str(path))])
    if path.suffix == ".json" and text.lstrip().startswith("["):
        return _rows_of_list(text, path)
    return _rows_of_lines(text, path)


def _rows_of_list(text: str, path: Path) -> Iterator[Row]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from error
    for index, value in enumerate(values):
        yield _row(value, f"{path}, element {index}")


def _rows_of_lines(text: str, path: Path) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines() also cuts at U+2028 inside strings
        if line.strip():
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: not valid JSON ({error.msg}); a file holds one JSON object a line, "
                    f"or one list of objects when its name ends in .json"
                ) from error
            yield _row(value, f"{path}, line {number}")


def _row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where}: a row must be a JSON object, got {value!r:.80}")
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
