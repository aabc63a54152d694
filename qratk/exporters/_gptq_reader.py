"""A folder of GPTQ's form, version 2, as dense weights, by the rules of GPTQModel alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qratk.core.errors import ConfigurationError
from qratk.exporters._shards import Lazy, read_shards


def read_gptq(directory: Path) -> Lazy:
    """Tensors by the names that a dense folder has, weights unpacked when they are read, in float32."""
    settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    if settings["checkpoint_format"] != "gptq_v2":
        raise ConfigurationError(f"{directory} is of the form {settings['checkpoint_format']!r}, expected 'gptq_v2'")
    stored, found = read_shards(directory), {}
    for name, read in stored.items():
        module, _, part = name.rpartition(".")
        if f"{module}.qweight" not in stored or part == "bias":
            found[name] = read
        elif part == "qweight":
            found[f"{module}.weight"] = _reader(stored, module, settings)
    return found


def _reader(stored: Lazy, module: str, settings: Mapping[str, Any]) -> Callable[[], torch.Tensor]:
    rules = _rules(module, settings)
    if rules is None:
        raise ConfigurationError(f"{module} is packed, and a rule of `dynamic` leaves it out")
    return partial(_unpacked, stored, module, rules["bits"])


def _rules(module: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """What holds for a module: the first rule of `dynamic` that fits over what holds for all; None for left out."""
    for pattern, rule in settings["dynamic"].items():
        if re.match(pattern.removeprefix("+:").removeprefix("-:"), module):
            return None if pattern.startswith("-:") else {**settings, **rule}
    return dict(settings)


def _unpacked(stored: Lazy, module: str, bits: int) -> torch.Tensor:
    """scale * (code - zero), (d_out, d_in) float32; a weight's group is what `g_idx` says."""
    groups = stored[f"{module}.g_idx"]().long()
    codes = _numbers(stored[f"{module}.qweight"]().t(), bits)
    zeros = _numbers(stored[f"{module}.qzeros"](), bits).T
    scales = stored[f"{module}.scales"]().t().float()
    distance = torch.from_numpy(codes - zeros[:, groups.numpy()]).float()
    return distance * scales[:, groups]


def _numbers(words: torch.Tensor, bits: int) -> np.ndarray:
    """Whole numbers (rows, n) int64 of rows of 32-bit words: as many as fit, some of them across two words."""
    rows = words.contiguous().numpy().view(np.uint8)
    stream = np.unpackbits(rows, axis=1, bitorder="little").reshape(len(rows), -1, bits).astype(np.int64)
    found: np.ndarray = (stream << np.arange(bits)).sum(axis=2)
    return found
