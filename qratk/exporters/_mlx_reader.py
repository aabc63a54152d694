"""A folder for mlx-lm as dense weights and adapters, by the rules of mlx alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from qratk.adapters.matrices.folder import Pair
from qratk.exporters._shards import Lazy, read_shards


def read_mlx(directory: Path) -> Lazy:
    """Tensors by the names that a dense folder has, weights unpacked when they are read, in float32.

    A module is packed where it has scales; its bits and groups are what `quantization` says of it, or else of all.
    """
    settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))["quantization"]
    stored = read_shards(directory)
    found: dict[str, Callable[[], torch.Tensor]] = {}
    for name, read in stored.items():
        module, _, part = name.rpartition(".")
        if f"{module}.scales" not in stored or part == "bias":
            found[name] = read
        elif part == "weight":
            own = settings.get(module, settings)
            found[name] = partial(_unpacked, stored, module, own["bits"], own["group_size"])
    return found


def _unpacked(stored: Lazy, module: str, bits: int, group_size: int) -> torch.Tensor:
    """scale * code + bias, (d_out, d_in) float32."""
    words = stored[f"{module}.weight"]().view(torch.int32).contiguous().numpy().view(np.uint8)
    places = np.unpackbits(words, axis=1, bitorder="little").reshape(len(words), -1, group_size, bits)
    codes = (places.astype(np.int64) << np.arange(bits)).sum(axis=3)
    scale, bias = (stored[f"{module}.{part}"]().float().unsqueeze(-1) for part in ("scales", "biases"))
    return (torch.from_numpy(codes).float() * scale + bias).flatten(1)


def read_mlx_adapter(directory: Path) -> dict[str, Pair]:
    """Pairs by the names of projections, of the one rank and the one scale that all have."""
    parameters = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))["lora_parameters"]
    tensors = load_file(directory / "adapters.safetensors")
    found = {}
    for name in parameters["keys"]:
        a, b = tensors[f"{name}.lora_a"].t(), tensors[f"{name}.lora_b"].t()
        found[name] = Pair(a[: parameters["rank"]], b[:, : parameters["rank"]], parameters["scale"])
    return found
