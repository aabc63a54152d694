"""A folder of compressed-tensors as dense weights, by the rules of that format alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qratk.exporters._shards import Lazy, read_shards


def read_compressed(directory: Path) -> Lazy:
    """Tensors by the names that a dense folder has, weights unpacked when they are read, in float32."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    settings = {name: group["weights"] for group in config["config_groups"].values() for name in group["targets"]}
    stored = read_shards(directory)
    found: dict[str, Callable[[], torch.Tensor]] = {
        name: read for name, read in stored.items() if name.rpartition(".")[0] not in settings or name.endswith(".bias")
    }
    for name, weights in settings.items():
        found[f"{name}.weight"] = partial(_unpacked, stored, name, weights)
    return found


def _unpacked(stored: Lazy, name: str, weights: Mapping[str, Any]) -> torch.Tensor:
    """scale * (code - zero), (d_out, d_in) float32, with signed codes and zeros as the library has them."""
    bits, offset = weights["num_bits"], 2 ** (weights["num_bits"] - 1)
    d_out, d_in = stored[f"{name}.weight_shape"]().tolist()
    codes = _whole(stored[f"{name}.weight_packed"](), bits, d_in) - offset
    scale = stored[f"{name}.weight_scale"]().float()
    groups = d_in // weights["group_size"]
    if weights["symmetric"]:
        zero = np.zeros((d_out, groups), np.int64)
    else:
        zero = _whole(stored[f"{name}.weight_zero_point"]().t(), bits, d_out).T - offset
    distance = torch.from_numpy(codes.reshape(d_out, groups, -1) - zero[:, :, None]).float()
    return (distance * scale[:, :, None]).flatten(1)


def _whole(words: torch.Tensor, bits: int, count: int) -> np.ndarray:
    """The first whole numbers (rows, count) int64 of 32-bit words, 32 / bits of them a word, low bits first."""
    given = words.contiguous().numpy().view(np.uint32).astype(np.int64)
    shifts = np.arange(0, 32 // bits * bits, bits, dtype=np.int64)
    found: np.ndarray = ((given[:, :, None] >> shifts) & (2**bits - 1)).reshape(len(given), -1)[:, :count]
    return found
