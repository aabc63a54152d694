"""What people write today, from public libraries alone: layers of bitsandbytes and HQQ under PEFT's LoRA."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn


def projections(model: nn.Module) -> dict[int, list[str]]:
    """Names of the linear layers of each transformer block."""
    blocks: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        parts = name.split(".")
        if type(module) is nn.Linear and "layers" in parts:
            blocks.setdefault(int(parts[parts.index("layers") + 1]), []).append(name)
    return blocks


def quantised_linear(linear: nn.Linear, bits: int, *, dtype: torch.dtype, device: str = "cpu") -> Any:
    """The layer at 8 or 4 bits by bitsandbytes, at 3 or 2 by HQQ; at 16 as it is."""
    sizes = {"input_features": linear.in_features, "output_features": linear.out_features}
    has_bias = linear.bias is not None
    if bits == 16:
        return linear.to(device, dtype)
    if bits in (2, 3):
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        config: Any = BaseQuantizeConfig(nbits=bits, group_size=64, axis=1)
        return HQQLinear(linear, config, compute_dtype=dtype, device=device, del_orig=True)
    import bitsandbytes.nn

    layer: Any
    bnb: Any = bitsandbytes.nn
    if bits == 8:
        layer = bnb.Linear8bitLt(**sizes, bias=has_bias, has_fp16_weights=False, device="meta")
        layer.weight = bnb.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    else:
        options = {"compute_dtype": dtype, "compress_statistics": True, "quant_type": "nf4"}
        layer = bnb.Linear4bit(**sizes, bias=has_bias, device="meta", **options)
        layer.weight = bnb.Params4bit(
            linear.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer
        )
    if has_bias:
        layer.bias = nn.Parameter(linear.bias.data.to(dtype), requires_grad=False)
    return layer.to(device)  # quantises


def quantise(model: Any, bits: Sequence[int], *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
    """Replace the linear layers of each block by quantised ones, in place."""
    for number, names in projections(model).items():
        for name in names:
            parent, _, attribute = name.rpartition(".")
            owner = model.get_submodule(parent)
            setattr(
                owner, attribute, quantised_linear(getattr(owner, attribute), bits[number], dtype=dtype, device=device)
            )
    model.is_loaded_in_4bit = model.is_loaded_in_8bit = True  # PEFT looks for these flags, not at the layers


def lora(model: Any, names: Mapping[int, Sequence[str]], ranks: Sequence[int], **options: Any) -> Any:
    """PEFT model with the given rank in each block, alpha twice the rank; only the adapters train."""
    from peft import LoraConfig, get_peft_model

    pattern = {"^" + name.replace(".", r"\."): ranks[block] for block, listed in names.items() for name in listed}
    config = LoraConfig(
        r=max(ranks),
        lora_alpha=2 * max(ranks),
        rank_pattern=pattern,
        alpha_pattern={key: 2 * rank for key, rank in pattern.items()},
        target_modules=[name for listed in names.values() for name in listed],
        task_type="CAUSAL_LM",
        **options,
    )
    return get_peft_model(model, config)


def peft_model(
    model: Any, bits: Sequence[int], ranks: Sequence[int], *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Any:
    """Quantised copy of a model under LoRA; the original stays as it is."""
    made = copy.deepcopy(model)
    names = projections(made)
    quantise(made, bits, dtype=dtype, device=device)
    return lora(made.to(device), names, ranks)
