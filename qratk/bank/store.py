"""The bank on disk: packed weights of a model, made once, mapped into memory by every run that needs them.

A store is a cache: it may be deleted at any time, and never decides a result. Its layout is
`<directory>/<weights>/<bits>-<settings>/<layer>.safetensors`, where `weights` is a digest of the projections' names and
values, and `settings` one of what packs each projection (after fallbacks) and of the software that does it. So a change
of the quantizer of one bit-width leaves the others as they are.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import inspect
import json
import logging
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from qratk.bank.digests import checksum
from qratk.bank.table import Chosen
from qratk.core.errors import ConfigurationError
from qratk.quantizers.base import Quantizer

FORMAT = "qratk-bank-1"
SOFTWARE = ("qratk", "torch", "hqq", "bitsandbytes")

Packed = dict[str, torch.Tensor]
Say = Callable[[str], None]


def log(text: str) -> None:
    """Say something through the logger "qratk", which by default writes to standard error."""
    logging.getLogger("qratk").warning(text)


def bank_directory(option: str | Path | None) -> Path | None:
    """Folder of stores: None for none, "auto" for $QRATK_CACHE, else qratk/banks in the user's cache folder."""
    if option is None:
        return None
    try:
        if option != "auto":
            return Path(option).expanduser()
        if given := os.environ.get("QRATK_CACHE"):
            return Path(given).expanduser()
        cache = os.environ.get("XDG_CACHE_HOME")
        return (Path(cache) if cache else Path.home() / ".cache") / "qratk" / "banks"
    except RuntimeError as error:  # no home directory
        if option != "auto":
            raise ConfigurationError(f"bank_dir {str(option)!r}: {error}") from error
        return None


@dataclass(frozen=True)
class Part:
    """A projection within a layer's file: its qualified name, its shape (d_out, d_in), and what packs it."""

    name: str
    shape: tuple[int, int]
    chosen: Chosen


@dataclass(frozen=True)
class Plan:
    """What packs every projection at one bit-width, layer by layer, and on which kind of device.

    The device counts because sums may be rounded otherwise there; `calibration` is a digest of what decides the
    moments that quantizers are given, and empty when none wants any.
    """

    bits: int
    layers: tuple[tuple[str, tuple[Part, ...]], ...]
    device: str = "cpu"
    calibration: str = ""

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the settings, hexadecimal."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()

    @property
    def settings(self) -> dict[str, str]:
        """All that decides the packed bytes besides the weights, as text."""
        chosen = {part.name: part.chosen for _, parts in self.layers for part in parts}
        code = {type(c.quantizer).__qualname__: _source_digest(type(c.quantizer)) for c in chosen.values()}
        calibration = {"calibration": self.calibration} if self.calibration else {}
        return {
            **calibration,
            "format": FORMAT,
            "bits": str(self.bits),
            "device": self.device,
            "quantizers": json.dumps({name: str(c) for name, c in chosen.items()}),
            "layers": json.dumps([name for name, _ in self.layers]),
            "code": json.dumps(code, sort_keys=True),
            "software": json.dumps({name: _version(name) for name in SOFTWARE}),
        }


class BankStore:
    """The files of one model's packed weights; whatever goes wrong with them, the bank is made in memory instead.

    Each file is written beside its place and then moved there, so that none is ever half a file; it carries what it is
    of and a checksum, and one that is damaged or foreign is made again. Nothing is flushed to the disk: a file that a
    power failure tore fails its checksum.

    Args:
        directory: folder of stores, made when needed.
        weights: hexadecimal digest of the projections' names and values.
        model: name of the model, for people who look into the folder.
        say: is told, once each, when a file is made again or the store cannot be used.
    """

    def __init__(self, directory: Path, *, weights: str, model: str = "", say: Say = log) -> None:
        self.folder = directory / weights[:32]
        self._weights, self._model, self._say = weights, model, say
        self._unusable = False
        self._said: set[str] = set()

    def path(self, plan: Plan, index: int) -> Path:
        """Where a layer's file at a bit-width lies."""
        return self.folder / f"{plan.bits}-{plan.digest[:16]}" / f"{index:04d}.safetensors"

    def fetch(self, plan: Plan, index: int, build: Callable[[], dict[str, Packed]]) -> dict[str, Packed]:
        """Packed tensors of a layer's projections, mapped from its file; made by `build` where there is none yet.

        Where several processes want a file, one makes it and the others wait for it.
        """
        path, expected = self.path(plan, index), self._metadata(plan, index)
        found = self._read(path, plan, index, expected)
        if found is not None:
            return found
        if self._unusable:
            return build()
        with self._lock(path.parent):
            found = self._read(path, plan, index, expected)  # it may have been made meanwhile
            if found is not None:
                return found
            packed = build()
            if self._write(path, plan, packed, expected):
                found = self._read(path, plan, index, expected)
        return packed if found is None else found

    def _metadata(self, plan: Plan, index: int) -> dict[str, str]:
        layer, parts = plan.layers[index]
        return {
            "format": FORMAT,
            "weights": self._weights,
            "bits": str(plan.bits),
            "layer": layer,
            "quantizers": json.dumps({part.name: str(part.chosen) for part in parts}),
            **({"calibration": plan.calibration} if plan.calibration else {}),
        }

    def _read(self, path: Path, plan: Plan, index: int, expected: Mapping[str, str]) -> dict[str, Packed] | None:
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                metadata = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, SafetensorError, ValueError, RuntimeError) as error:
            self._tell("damaged", f"the bank file {path} is damaged ({error}); it is made again")
            return None
        reason = _unfit(metadata, tensors, expected, plan.layers[index][1])
        if reason:
            self._tell("damaged", f"the bank file {path} is {reason}; it is made again")
            return None
        return _by_projection(tensors)

    def _write(self, path: Path, plan: Plan, packed: Mapping[str, Packed], metadata: Mapping[str, str]) -> bool:
        tensors = {f"{name}/{part}": t.cpu().contiguous() for name, p in packed.items() for part, t in p.items()}
        temporary = path.with_name(f".{path.stem}-{os.getpid()}-{secrets.token_hex(4)}.tmp")
        try:
            self._describe(path.parent, plan)
            save_file(tensors, temporary, metadata={**metadata, "checksum": checksum(tensors)})
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            self._give_up(error)
            return False
        finally:
            _remove(temporary)
        return True

    def _describe(self, folder: Path, plan: Plan) -> None:
        path = folder / "bank.json"
        if path.exists():
            return
        about = "Packed weights, a cache of qratk: made again when needed, so this folder may be deleted."
        settings = {k: json.loads(v) if v[:1] in "[{" else v for k, v in plan.settings.items()}
        text = json.dumps({"about": about, "model": self._model, "weights": self._weights, **settings}, indent=2)
        temporary = path.with_name(f".bank-{os.getpid()}-{secrets.token_hex(4)}.tmp")
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, path)

    @contextmanager
    def _lock(self, folder: Path) -> Iterator[None]:
        # Released by the system when its holder dies. Without one the files are still whole, only made twice.
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            self._give_up(error)
            yield
            return
        try:
            if _hold(handle):
                for left in folder.glob(".*.tmp"):  # of a process that was killed while it wrote
                    _remove(left)
            yield
        finally:
            os.close(handle)

    def _give_up(self, error: Exception) -> None:
        self._unusable = True
        self._tell(
            "unusable",
            f"the bank cannot be written to {self.folder} ({error}), so it is kept in memory; "
            "give another folder as bank_dir (or the environment variable QRATK_CACHE) to have it made only once",
        )

    def _tell(self, kind: str, text: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            self._say(text)


def _unfit(
    metadata: Mapping[str, str],
    tensors: Mapping[str, torch.Tensor],
    expected: Mapping[str, str],
    parts: tuple[Part, ...],
) -> str:
    """Why a file is not the one that is wanted; empty when it is."""
    for key, value in expected.items():
        if metadata.get(key) != value:
            return f"foreign ({key} is {_short(metadata.get(key))}, not {_short(value)})"
    if metadata.get("checksum") != checksum(tensors):
        return "damaged (its checksum is not that of its contents)"
    packed = _by_projection(tensors)
    for part in parts:
        measured = sum(tensor.nbytes for tensor in packed.get(part.name, {}).values())
        if measured != part.chosen.packed_bytes(part.shape).total:
            return f"foreign ({part.name} has {measured} bytes, not {part.chosen.packed_bytes(part.shape).total})"
    return ""


def _short(text: str | None) -> str:
    return repr(text if text is None or len(text) < 60 else text[:57] + "...")


def _by_projection(tensors: Mapping[str, torch.Tensor]) -> dict[str, Packed]:
    packed: dict[str, Packed] = {}
    for key, tensor in tensors.items():
        name, _, part = key.rpartition("/")
        packed.setdefault(name, {})[part] = tensor
    return packed


def _hold(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:  # some network file systems have no locks
        return False
    return True


def return_freed_memory() -> None:
    """Give memory that was freed back to the system.

    The GNU allocator keeps what lies between other blocks: over a whole model, as much as the bank itself.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return


@lru_cache(maxsize=16)
def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


@lru_cache(maxsize=64)
def _source_digest(cls: type[Quantizer]) -> str:
    # Of the files that define the class and its parents: whoever writes a quantizer and changes it wants a new bank.
    hasher = hashlib.sha256()
    for parent in cls.__mro__:
        try:
            hasher.update(Path(inspect.getfile(parent)).read_bytes())
        except (OSError, TypeError):  # built in, or typed into an interpreter
            hasher.update(parent.__qualname__.encode())
    return hasher.hexdigest()[:16]
