"""GGUF files as a Hugging Face model, by what llama.cpp does with them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qratk.adapters.matrices.folder import Pair
from qratk.core.errors import ConfigurationError
from qratk.exporters._gguf_architecture import ROPE, Architecture, architecture_of, restored
from qratk.exporters._gguf_file import Contents, read_gguf
from qratk.exporters._shards import Lazy

_SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
}


def read_model(path: Path, like: Any) -> tuple[Any, Lazy]:
    """Configuration, with sizes of the file's metadata in it, and tensors by the names of the checkpoint.

    `like` is a configuration of the family. Raises `ConfigurationError` for a file of another architecture.
    """
    contents, architecture = read_gguf(path), architecture_of(like)
    if (found := contents.metadata["general.architecture"]) != architecture.name:
        raise ConfigurationError(f"{path} is of the architecture {found!r}, expected {architecture.name!r}")
    config = copy.deepcopy(like)
    for key, name in _SIZES.items():
        setattr(config, name, contents.metadata[f"{architecture.name}.{key}"])
    return config, _tensors(contents, config, architecture)


def _tensors(contents: Contents, config: Any, architecture: Architecture) -> Lazy:
    found: dict[str, Callable[[], torch.Tensor]] = {}
    ours = _checkpoint_names(config, architecture)
    for name, read in contents.tensors.items():
        if name == ROPE:
            continue
        original = ours[name]
        module = original.rpartition(".")[0]
        norm = module.endswith("norm")
        offset = architecture.norm_offset if norm else 0.0
        found[original] = partial(_read, read, architecture.heads(module, config), offset)
    return found


def _read(read: Callable[[], np.ndarray], heads: int | None, offset: float) -> torch.Tensor:
    tensor = torch.from_numpy(read())
    return (tensor if heads is None else restored(tensor, heads)) - offset


def _checkpoint_names(config: Any, architecture: Architecture) -> dict[str, str]:
    """Names of the checkpoint by those of the file."""
    modules = ["model.embed_tokens", "model.norm", "lm_head"]
    modules += [
        f"model.layers.{index}.{local}" for index in range(config.num_hidden_layers) for local in architecture.locals
    ]
    return {architecture.tensor_name(f"{m}.{part}"): f"{m}.{part}" for m in modules for part in ("weight", "bias")}


def read_adapter(path: Path, config: Any) -> dict[str, Pair]:
    """Pairs by the names of the checkpoint's projections, of factor 1 as a client has it."""
    contents, architecture = read_gguf(path), architecture_of(config)
    if contents.metadata["adapter.lora.alpha"] != 0:
        raise ConfigurationError(f"{path} is scaled by its alpha, and the scale is in the matrices")
    ours = _checkpoint_names(config, architecture)
    found = {}
    for name, read in contents.tensors.items():
        if not name.endswith(".lora_a"):
            continue
        weight = name.removesuffix(".lora_a")
        module = ours[weight].removesuffix(".weight")
        b = _read(contents.tensors[f"{weight}.lora_b"], architecture.heads(module, config), 0.0)
        found[module] = Pair(torch.from_numpy(read()), b, 1.0)
    return found
