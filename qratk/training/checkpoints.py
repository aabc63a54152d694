"""States of trainings on disk: written whole or not at all, by any number of processes, and checked when read."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from qratk.training.state import TrainingState

ADAPTER: Final = "adapter.safetensors"
OPTIMIZER: Final = "optimizer.safetensors"
STATE: Final = "state.json"


def save_state(path: Path, state: TrainingState, *, optimizer: bool) -> None:
    """Write a state into a folder in one step: a kill leaves either all of it or nothing.

    A whole state that is there already stays: another process was faster, and came to the same. Raises `OSError` or
    `SafetensorError` when it cannot be written.
    """
    from safetensors.torch import save_file

    part = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    part.mkdir(parents=True)
    try:
        save_file({name: value.contiguous() for name, value in state.adapter.items()}, part / ADAPTER)
        if optimizer:
            tensors = {**state.optimizer, "random": state.random}
            if state.device_random is not None:
                tensors["device_random"] = state.device_random
            save_file(tensors, part / OPTIMIZER)
        digests = {file.name: _digest(file) for file in sorted(part.iterdir())}
        content = {"steps": state.steps, "digests": digests}
        (part / STATE).write_text(json.dumps({**content, "digest": _digest_of(content)}))
        for file in (*part.iterdir(), part):
            _flush(file)
        _settle(part, path, optimizer=optimizer)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def load_state(path: Path) -> TrainingState:
    """A state as it was saved; raises `OSError`, `SafetensorError` or `ValueError` when it is damaged.

    States from before digests were kept are read unchecked.
    """
    import torch
    from safetensors.torch import load_file

    from qratk.training.state import TrainingState

    steps = _checked_steps(path)
    moments = load_file(path / OPTIMIZER) if (path / OPTIMIZER).exists() else {}
    random, device_random = moments.pop("random", torch.get_rng_state()), moments.pop("device_random", None)
    return TrainingState(steps, load_file(path / ADAPTER), moments, random, device_random)


def continues(path: Path) -> bool:
    """Whether a training can go on from the state in a folder: the optimiser's is there too."""
    return (path / OPTIMIZER).exists()


def discard_state(path: Path) -> None:
    """Delete a state, what was left of writing it, and the folder around it when that is empty; none is no error."""
    for folder in (path, *filter(_is_abandoned, path.parent.glob(f"{path.name}.*part"))):
        shutil.rmtree(folder, ignore_errors=True)
    if path.parent.is_dir() and not any(path.parent.iterdir()):
        path.parent.rmdir()


def _settle(part: Path, path: Path, *, optimizer: bool) -> None:
    """Give a written folder its name; one that has it gives way unless it is whole."""
    while True:
        try:
            os.rename(part, path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            return
        if _is_whole(path) and (continues(path) or not optimizer):
            return
        with suppress(FileNotFoundError):  # another writer may take it away at the same time
            shutil.rmtree(path)


def _is_abandoned(part: Path) -> bool:
    """Whether the process that wrote a folder is gone."""
    owner = part.suffixes[-2].lstrip(".").partition("-")[0] if len(part.suffixes) > 1 else ""
    try:
        os.kill(int(owner), 0)
    except (ValueError, ProcessLookupError):
        return True
    except PermissionError:
        return False
    return False


def _is_whole(path: Path) -> bool:
    try:
        return "digests" in _content(path) and _checked_steps(path) >= 0
    except (OSError, ValueError):
        return False


def _checked_steps(path: Path) -> int:
    content = _content(path)
    steps = content.get("steps")
    if content.keys() != {"steps"}:  # else from before digests were kept
        digests = content.get("digests", {})
        if content.get("digest") != _digest_of({"steps": steps, "digests": digests}):
            raise ValueError(f"{STATE} differs from its digest")
        for name, digest in digests.items():
            if _digest(path / name) != digest:
                raise ValueError(f"{name} differs from its digest")
    if not isinstance(steps, int):
        raise ValueError(f"{STATE} has no number of steps")
    return steps


def _content(path: Path) -> dict[str, Any]:
    content = json.loads((path / STATE).read_text())
    if not isinstance(content, dict):
        raise ValueError(f"{STATE} is no mapping")
    return content


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
