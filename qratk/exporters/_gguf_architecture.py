"""How llama.cpp names and lays out what Hugging Face has: names of tensors, rows that change places, metadata."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from qratk.core.errors import UnsupportedModelError
from qratk.exporters._gguf_file import Value

_PLAIN: Final = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_BLOCK: Final = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_SANDWICH: Final = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_LAYER: Final = re.compile(r"model\.layers\.(\d+)\.(.+)")
ROPE: Final = "rope_freqs.weight"


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp.

    Attributes:
        name: in files.
        permuted: whether rows of q and k are ordered for rotations of neighbours, not of halves.
        norm_offset: what norms of the file have more than those of the checkpoint.
        sandwich: whether a block has four norms.
        sliding: whether attention of some blocks sees a window, and metadata say so.
    """

    name: str
    permuted: bool = False
    norm_offset: float = 0.0
    sandwich: bool = False
    sliding: bool = False

    @property
    def locals(self) -> Mapping[str, str]:
        """The file's names of a block's modules, by their names in the block."""
        return {**_BLOCK, **_SANDWICH} if self.sandwich else _BLOCK

    def tensor_name(self, name: str) -> str:
        """The file's name of a tensor of the model; raises `UnsupportedModelError` when there is none."""
        module, _, part = name.rpartition(".")
        if module in _PLAIN:
            return f"{_PLAIN[module]}.{part}"
        found = _LAYER.fullmatch(module)
        local = self.locals.get(found[2]) if found else None
        if found is None or local is None:
            raise UnsupportedModelError(f"llama.cpp's architecture {self.name!r} has no tensor for {name!r}")
        return f"blk.{found[1]}.{local}.{part}"

    def heads(self, name: str, config: Any) -> int | None:
        """Heads whose rows change places in a weight or bias of this module; None where they stay."""
        if not self.permuted:
            return None
        tail = name.rpartition(".")[2]
        return {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(tail)


_FAMILIES: Final[Mapping[str, Architecture]] = {
    "llama": Architecture("llama", permuted=True),
    "mistral": Architecture("llama", permuted=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma", norm_offset=1.0),
    "gemma2": Architecture("gemma2", norm_offset=1.0, sandwich=True, sliding=True),
    "gemma3_text": Architecture("gemma3", norm_offset=1.0, sandwich=True, sliding=True),
}


def architecture_of(config: Any) -> Architecture:
    """The architecture of a model's configuration; raises `UnsupportedModelError` for a family that is not known."""
    found = _FAMILIES.get(config.model_type)
    if found is None:
        raise UnsupportedModelError(
            f"no layout of llama.cpp is known here for the family {config.model_type!r}, but for {sorted(_FAMILIES)}; "
            "export 'dense' and convert that with llama.cpp's convert_hf_to_gguf.py"
        )
    if (scaling := _rope(config).get("rope_type", "default")) not in ("default", "llama3", "linear"):
        raise UnsupportedModelError(
            f"positions are scaled by {scaling!r}, which is not written here; export 'dense' and convert that with "
            "llama.cpp's convert_hf_to_gguf.py"
        )
    if found.name == "gemma2" or found.name == "gemma3":
        _require_scale(config)
    return found


def _require_scale(config: Any) -> None:
    """llama.cpp scales attention by the size of a head (of 27B models otherwise), and files cannot say more."""
    largest = config.num_hidden_layers == (46 if config.model_type == "gemma2" else 62)
    expected = config.hidden_size / config.num_attention_heads if largest else config.head_dim
    if config.query_pre_attn_scalar != expected:
        raise UnsupportedModelError(
            f"attention is scaled by query_pre_attn_scalar {config.query_pre_attn_scalar}, where llama.cpp takes "
            f"{expected:g}; export 'dense' for another server"
        )


def permuted(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k (d_out, ...) in the order of the file: the halves of a head taken in turn."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def restored(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows in the order of the checkpoint, from that of the file."""
    return rows.reshape(heads, len(rows) // heads // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def model_metadata(config: Any, architecture: Architecture, name: str) -> dict[str, Value]:
    """What llama.cpp needs to know of a model."""
    key, rope = architecture.name, _rope(config)
    head = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    found: dict[str, Value] = {
        "general.architecture": key,
        "general.type": "model",
        "general.name": name,
        "general.quantization_version": 2,
        f"{key}.vocab_size": int(config.vocab_size),
        f"{key}.context_length": int(config.max_position_embeddings),
        f"{key}.embedding_length": int(config.hidden_size),
        f"{key}.block_count": int(config.num_hidden_layers),
        f"{key}.feed_forward_length": int(config.intermediate_size),
        f"{key}.attention.head_count": int(config.num_attention_heads),
        f"{key}.attention.head_count_kv": int(config.num_key_value_heads),
        f"{key}.attention.key_length": head,
        f"{key}.attention.value_length": head,
        f"{key}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{key}.rope.dimension_count": head,
        f"{key}.rope.freq_base": float(rope.get("rope_theta", 10000.0)),
    }
    if rope.get("rope_type") == "linear":
        found |= {f"{key}.rope.scaling.type": "linear", f"{key}.rope.scaling.factor": float(rope["factor"])}
    if architecture.sliding and config.sliding_window:
        found[f"{key}.attention.sliding_window"] = int(config.sliding_window)
        if key == "gemma3":
            found[f"{key}.rope.freq_base_swa"] = float(_rope(config, "sliding_attention").get("rope_theta", 10000.0))
    for name_, option in (("attn", "attn_logit_softcapping"), ("final", "final_logit_softcapping")):
        if architecture.sliding and (cap := getattr(config, option, None)):
            found[f"{key}.{name_}_logit_softcapping"] = float(cap)
    return found


def rope_factors(config: Any) -> torch.Tensor | None:
    """Factors by which frequencies are divided (Llama 3), (head_dim / 2,); None where there are none."""
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    head = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    frequencies = 1.0 / float(rope["rope_theta"]) ** (torch.arange(0, head, 2, dtype=torch.float32) / head)
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    length, factor = float(rope["original_max_position_embeddings"]), float(rope["factor"])
    waves = 2 * math.pi / frequencies
    smooth = (length / waves - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    found = torch.where(waves > length / low, torch.full_like(waves, factor), between)
    return torch.where(waves < length / high, torch.ones_like(waves), found)


def _rope(config: Any, kind: str = "full_attention") -> dict[str, Any]:
    """Options of rotary positions, of configurations of transformers 4 and 5."""
    given = getattr(config, "rope_parameters", None)
    if not isinstance(given, Mapping):
        scaling = dict(getattr(config, "rope_scaling", None) or {})
        local = kind == "sliding_attention"
        theta = getattr(config, "rope_local_base_freq" if local else "rope_theta", 10000.0)
        return {"rope_theta": theta, **({} if local else scaling)}
    return dict(given.get(kind) or given)
