"""GGUF files, version 3: metadata and tensors, written one after another and read where they lie."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from qratk.core.errors import ConfigurationError
from qratk.core.work import counted
from qratk.exporters._gguf_blocks import KINDS, Kind, dequantised

_MAGIC: Final = b"GGUF"
_VERSION: Final = 3
_ALIGNMENT: Final = 32
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
_SCALARS: Final = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", _UINT32: "<I", _INT32: "<i", _FLOAT32: "<f", _BOOL: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip

Value = bool | int | float | str | Sequence[int] | Sequence[float] | Sequence[str]
"""A piece of metadata: whole numbers are written in 32 bits, those of lists with a sign."""


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: its type, its shape with rows first, and what makes its bytes."""

    kind: Kind
    shape: tuple[int, ...]
    content: Callable[[], bytes]


def write_gguf(path: Path, metadata: Mapping[str, Value], tensors: Mapping[str, Entry]) -> None:
    """Write a file; the bytes of a tensor are made when it is their turn."""
    with path.open("wb") as file:
        file.write(_MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), len(metadata)))
        for key, value in metadata.items():
            file.write(_text(key) + _value(value))
        offset = 0
        for name, entry in tensors.items():
            dims = entry.shape[::-1]
            file.write(_text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, entry.kind.number, offset))
            offset += _aligned(entry.kind.nbytes(int(np.prod(entry.shape))))
        _pad(file)
        for name, entry in counted("writing tensors", tensors.items(), len(tensors)):
            content = entry.content()
            expected = entry.kind.nbytes(int(np.prod(entry.shape)))
            assert len(content) == expected, f"{name}: {len(content)} bytes, not {expected}"
            file.write(content)
            _pad(file)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _pad(file: BinaryIO) -> None:
    file.write(b"\0" * (-file.tell() % _ALIGNMENT))


def _text(text: str) -> bytes:
    content = text.encode("utf-8")
    return struct.pack("<Q", len(content)) + content


def _value(value: Value) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    first = value[0] if value else 0
    if isinstance(first, str):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(_text(str(item)) for item in value)
    kind, code = (_FLOAT32, "f") if isinstance(first, float) else (_INT32, "i")
    return struct.pack(f"<IIQ{len(value)}{code}", _ARRAY, kind, len(value), *value)


@dataclass(frozen=True)
class Contents:
    """What a file holds: metadata, and tensors (rows first) by name, float32, each read when it is asked for."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, Callable[[], np.ndarray]]
    kinds: Mapping[str, Kind]


def read_gguf(path: Path) -> Contents:
    """What is in a file; raises `ConfigurationError` when it is none, or holds a type that is not written here."""
    with path.open("rb") as file:
        if file.read(4) != _MAGIC:
            raise ConfigurationError(f"{path} is no GGUF file")
        version, count, pairs = _unpack(file, "<IQQ")
        if version != _VERSION:
            raise ConfigurationError(f"{path} is of GGUF version {version}, expected {_VERSION}")
        metadata = dict(_read_pair(file) for _ in range(pairs))
        found = [_read_info(file) for _ in range(count)]
        start = _aligned(file.tell())
    tensors: dict[str, Callable[[], np.ndarray]] = {}
    kinds: dict[str, Kind] = {}
    for name, shape, number, offset in found:
        if number not in KINDS:
            raise ConfigurationError(f"{path}: {name} is of type {number}, which is not known")
        kinds[name] = KINDS[number]
        tensors[name] = partial(_read_tensor, path, start + offset, KINDS[number], shape)
    return Contents(metadata, tensors, kinds)


def _read_tensor(path: Path, start: int, kind: Kind, shape: tuple[int, ...]) -> np.ndarray:
    size = kind.nbytes(int(np.prod(shape)))
    return dequantised(kind, np.fromfile(path, np.uint8, size, offset=start)).reshape(shape)


def _read_info(file: BinaryIO) -> tuple[str, tuple[int, ...], int, int]:
    name = _read_text(file)
    (dims,) = _unpack(file, "<I")
    *shape, number, offset = _unpack(file, f"<{dims}QIQ")
    return name, tuple(shape[::-1]), number, offset


def _read_pair(file: BinaryIO) -> tuple[str, Any]:
    key = _read_text(file)
    (kind,) = _unpack(file, "<I")
    if kind != _ARRAY:
        return key, _read_value(file, kind)
    kind, count = _unpack(file, "<IQ")
    return key, [_read_value(file, kind) for _ in range(count)]


def _read_value(file: BinaryIO, kind: int) -> Any:
    return _read_text(file) if kind == _STRING else _unpack(file, _SCALARS[kind])[0]


def _read_text(file: BinaryIO) -> str:
    (size,) = _unpack(file, "<Q")
    return file.read(size).decode("utf-8")


def _unpack(file: BinaryIO, form: str) -> tuple[Any, ...]:
    return struct.unpack(form, file.read(struct.calcsize(form)))
