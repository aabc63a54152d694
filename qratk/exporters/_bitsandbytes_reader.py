"""A folder of bitsandbytes' codes as dense weights, by the tables and settings that are in it alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from qratk.exporters._shards import Lazy, read_shards

_STATE = "quant_state.bitsandbytes__nf4"


def read_bitsandbytes(directory: Path) -> Lazy:
    """Tensors by the names that a dense folder has, weights unpacked when they are read, in float32."""
    stored = read_shards(directory)
    found: dict[str, Callable[[], torch.Tensor]] = {}
    for name, read in stored.items():
        module = name.removesuffix(".weight")
        if f"{name}.{_STATE}" in stored:
            found[name] = partial(_of_4_bits, stored, name)
        elif module != name and f"{module}.SCB" in stored:
            found[name] = partial(_of_8_bits, stored, module)
        elif ".weight." not in name and not name.endswith((".SCB", ".weight_format")):
            found[name] = read
    return found


def _of_4_bits(stored: Lazy, name: str) -> torch.Tensor:
    """table[code] * maximum of the block, (d_out, d_in) float32; two codes a byte, the first in high bits."""
    told = json.loads(bytes(stored[f"{name}.{_STATE}"]().tolist()))
    codes = stored[name]().numpy().reshape(-1)
    table, largest = stored[f"{name}.quant_map"]().numpy(), stored[f"{name}.absmax"]().numpy()
    if "nested_offset" in told:
        outer = np.repeat(stored[f"{name}.nested_absmax"]().numpy(), told["nested_blocksize"])[: len(largest)]
        largest = stored[f"{name}.nested_quant_map"]().numpy()[largest] * outer + np.float32(told["nested_offset"])
    count = int(np.prod(told["shape"]))
    values = table[np.stack([codes >> 4, codes & 15], axis=1).reshape(-1)[:count]]
    return torch.from_numpy(values * np.repeat(largest, told["blocksize"])[:count]).reshape(told["shape"])


def _of_8_bits(stored: Lazy, module: str) -> torch.Tensor:
    """code * maximum of the row / 127, (d_out, d_in) float32."""
    return stored[f"{module}.weight"]().float() * (stored[f"{module}.SCB"]().float()[:, None] / 127)
