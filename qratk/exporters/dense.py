"""A plain dense model with the adapters merged into the dequantised weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from qratk.core.errors import ConfigurationError
from qratk.exporters.base import Exporter, exporters

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from qratk.backbone.backbone import Backbone

Dense = Literal["bfloat16", "float16", "float32"]


@exporters.register("dense")
class DenseExporter(Exporter):
    """A Hugging Face folder of merged weights, with its tokenizer.

    The memory that quantisation saved is lost, and logits agree to rounding only.

    Args:
        dtype: type of the weights.
    """

    def __init__(self, dtype: Dense = "bfloat16") -> None:
        if dtype not in get_args(Dense):
            raise ConfigurationError(f"dtype must be one of {get_args(Dense)}, got {dtype!r}")
        self.dtype = dtype

    @property
    def takes(self) -> str:
        """Whatever reads a Hugging Face model."""
        return "transformers and whatever else reads a Hugging Face model"

    def check(self, backbone: Backbone) -> None:
        """Every configuration can be merged."""

    def write(self, backbone: Backbone, directory: Path) -> None:
        """Merge and write."""
        import torch

        merged_model(backbone, dtype=getattr(torch, self.dtype)).save_pretrained(directory)
        if backbone.tokenizer is not None:
            backbone.tokenizer.save_pretrained(directory)


def merged_model(backbone: Backbone, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Plain Hugging Face model of the active configuration: W + scaling * B A, for tools that take dense weights.

    The sums are made in float32 from the adapters as stored, then rounded to `dtype` (default: the compute dtype). The
    memory that quantisation saved is lost, and logits agree to rounding only.
    """
    import torch

    from qratk.backbone.layers import is_conv1d
    from qratk.exporters._skeleton import empty_like, fill

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
