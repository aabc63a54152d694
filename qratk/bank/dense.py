"""Dequantised weights that are kept while memory allows: faster steps and switches, the same results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from qratk.core.errors import ConfigurationError

Mode = Literal["off", "on", "auto"]
Key = tuple[object, int | tuple[int, int], torch.dtype]  # a projection's token, bits (and rank), compute dtype

_SHARE = 0.25  # of the available memory: the rest is for activations, other runs and the page cache


def dense_cache_mode(value: bool | str) -> Mode:
    """The mode by its name, or as YAML 1.1 reads it: `on` and `off` are booleans there.

    Raises `ConfigurationError`.
    """
    if isinstance(value, bool):
        return "on" if value else "off"
    if value not in get_args(Mode):
        raise ConfigurationError(f"dense_cache must be one of {get_args(Mode)}, got {value!r}")
    return value  # type: ignore[return-value]


def available_memory(device: torch.device) -> int:
    """Bytes that may still be allocated on a device; on the CPU without swapping, and within a container's limit."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil  # comes with peft

    available = int(psutil.virtual_memory().available)
    return min(available, _left_in_container(Path("/sys/fs/cgroup"), otherwise=available))


def _left_in_container(folder: Path, *, otherwise: int) -> int:
    try:
        limit, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
        lines = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        reclaimable = sum(int(value) for name, value in lines if name == "inactive_file")
    except (OSError, ValueError):  # no container, another version of cgroups, or "max": no limit
        return otherwise
    return max(0, limit - used + reclaimable)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out."""
    # The CPU allocator, and whoever maps a file, raise a plain RuntimeError.
    words = ("can't allocate memory", "Cannot allocate memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in str(error) for word in words)


class DenseCache:
    """Dense weights of the projections of one backbone, at any bit-widths, within an allowance of bytes.

    "auto" keeps up to a quarter of the memory that is available, looked up at each switch; "on" keeps whatever the
    active configuration needs, and beyond that the same; "off" keeps nothing. What was used since the last switch
    stays; of the rest, what was used longest ago goes first. So a pass over all layers never evicts what the next pass
    needs first, and candidates that alternate find their weights again.
    """

    def __init__(self, mode: Mode = "off", *, available: Callable[[torch.device], int] = available_memory) -> None:
        self.mode: Mode = mode
        self.used = 0
        self._available = available
        self._allowance: int | None = None  # of this generation, once known
        self._generation = 0
        self._entries: dict[Key, tuple[torch.Tensor, int]] = {}  # least recently used first

    def __deepcopy__(self, memo: dict[int, Any]) -> DenseCache:
        # A copy begins empty: what is kept can be made again.
        return DenseCache(self.mode, available=self._available)

    def __len__(self) -> int:
        return len(self._entries)

    def holds(self, key: Key) -> bool:
        """Whether a weight is kept."""
        return key in self._entries

    def next_generation(self) -> None:
        """A switch: what is kept may make room from now on, and the memory is looked at again."""
        self._generation += 1
        self._allowance = None

    def clear(self) -> None:
        """Keep nothing of what there is."""
        self._entries.clear()
        self.used = 0

    def drop(self, token: object, bits: int | tuple[int, int] | None = None) -> None:
        """Forget the weights of a projection, of one bit-width or all."""
        for key in [k for k in self._entries if k[0] is token and bits in (None, k[1])]:
            self._remove(key)

    def get(self, key: Key, make: Callable[[], torch.Tensor], *, owned: Callable[[torch.Tensor], bool]) -> torch.Tensor:
        """The kept weight, or what `make` returns, which is then kept if there is room; not to be written to.

        `owned` tells whether a new weight has memory of its own (one that merely shows stored bytes needs no keeping).
        """
        if self.mode == "off":
            return make()
        entry = self._entries.pop(key, None)
        dense = entry[0] if entry else self._made(make)
        if self._allowance is None:
            self._allowance = int(_SHARE * (self._available(dense.device) + self.used))
            self._make_room(0)
        if entry or (owned(dense) and self._room_for(dense)):
            self._entries[key] = (dense, self._generation)
            self.used += 0 if entry else dense.nbytes
        return dense

    def _made(self, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        # A tensor made within inference mode could not be saved for a backward pass later.
        with torch.inference_mode(False), torch.no_grad():
            try:
                return make()
            except RuntimeError as error:
                if not is_out_of_memory(error) or not self._entries:
                    raise
                self.clear()
                self._allowance = 0
                return make()

    def _room_for(self, dense: torch.Tensor) -> bool:
        assert self._allowance is not None
        self._make_room(dense.nbytes)
        return self.mode == "on" or self.used + dense.nbytes <= self._allowance

    def _make_room(self, size: int) -> None:
        assert self._allowance is not None
        while self.used + size > self._allowance and self._entries:
            key, (_, generation) = next(iter(self._entries.items()))
            if generation == self._generation:
                return
            self._remove(key)

    def _remove(self, key: Key) -> None:
        self.used -= self._entries.pop(key)[0].nbytes
