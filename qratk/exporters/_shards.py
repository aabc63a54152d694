"""Tensors in safetensors files, one after another: a folder as Hugging Face has it, of a model that fits no memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from qratk.core.errors import ConfigurationError

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
SHARD_BYTES: Final = 2 * 2**30

Lazy = Mapping[str, Callable[[], torch.Tensor]]
"""Tensors by name, each read when it is asked for."""


def write_shards(tensors: Iterator[tuple[str, torch.Tensor]], directory: Path, *, limit: int = SHARD_BYTES) -> None:
    """Write tensors into `model.safetensors`, or into several files with an index where they are more than `limit`.

    No more of them is held at once than a file and one tensor take.
    """
    files: list[tuple[Path, dict[str, int]]] = []
    held: dict[str, torch.Tensor] = {}

    def flush() -> None:
        path = directory / f".shard-{len(files)}"
        save_file(held, path, metadata={"format": "pt"})
        files.append((path, {name: tensor.nbytes for name, tensor in held.items()}))
        held.clear()

    size = 0
    for name, tensor in tensors:
        if held and size + tensor.nbytes > limit:
            flush()
            size = 0
        held[name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
    flush()
    if len(files) == 1:
        files[0][0].rename(directory / SINGLE)
        return
    places: dict[str, str] = {}
    for number, (path, names) in enumerate(files, 1):
        final = f"model-{number:05}-of-{len(files):05}.safetensors"
        path.rename(directory / final)
        places |= dict.fromkeys(names, final)
    _write_index(sum(sum(names.values()) for _, names in files), places, directory)


def write_index(files: Mapping[str, Mapping[str, torch.Tensor]], directory: Path) -> None:
    """Say which of several files each tensor lies in."""
    total = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
    _write_index(total, {name: file for file, tensors in files.items() for name in tensors}, directory)


def _write_index(total: int, places: Mapping[str, str], directory: Path) -> None:
    document = {"metadata": {"total_size": total}, "weight_map": places}
    (directory / INDEX).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def read_shards(directory: Path) -> Lazy:
    """What `write_shards`, or transformers, wrote; raises `ConfigurationError` when there is nothing of it."""
    index = directory / INDEX
    if index.exists():
        places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    elif (directory / SINGLE).exists():
        with safe_open(directory / SINGLE, framework="pt") as file:
            places = dict.fromkeys(file.keys(), SINGLE)
    else:
        raise ConfigurationError(f"{directory} holds no weights: neither {SINGLE} nor {INDEX} is there")
    return {name: _reader(directory / place, name) for name, place in places.items()}


def _reader(path: Path, name: str) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        with safe_open(path, framework="pt") as file:
            found: torch.Tensor = file.get_tensor(name)
        return found

    return read
