"""A plain dense model with the adapters merged into the dequantised weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qratk.backbone.layers import is_conv1d
from qratk.core.errors import ConfigurationError
from qratk.export.skeleton import empty_like, fill

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qratk.backbone.backbone import Backbone


def merged_model(backbone: Backbone, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Plain Hugging Face model of the active configuration: W + scaling * B A, for tools that take dense weights.

    The sums are made in float32 from the adapters as stored, then rounded to `dtype` (default: the compute dtype). The
    memory that quantisation saved is lost, and logits agree to rounding only.
    """
    if backbone.configuration is None:
        raise ConfigurationError("no configuration is active; call `backbone.activate` first")
    dtype = dtype or backbone.compute_dtype
    model = empty_like(backbone)
    tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in backbone.fixed_tensors().items()}
    with backbone.stored_precision(), torch.no_grad():
        for name, bank in backbone.banks.items():
            weight = bank.dequantized(bank.active, rank=bank.active_rank) + backbone.adapters.delta(name)
            module = model.get_submodule(name)
            tensors[f"{name}.weight"] = (weight.t() if is_conv1d(module) else weight).to(dtype).contiguous()
            if bank.bias is not None:
                tensors[f"{name}.bias"] = bank.bias.to(dtype)
    fill(model, tensors)
    return model
