"""Layers of bitsandbytes that multiply by the dequantised weight in training and evaluation, on every processor.

In eval mode `Linear8bitLt` quantises activations too (about 0.2 % on logits), on CUDA always; `Linear4bit` multiplies
in bfloat16, with scales in bfloat16, on CPUs with AVX512-BF16 (about 0.4 % on a layer), where it also repacks its
weight in place and takes only whole blocks in a row and multiples of 32 outputs. Adapters are trained and scored
without that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes
import torch
from torch import nn

from qratk.quantizers.base import PackedLayer

Product = Callable[[torch.Tensor, Callable[[], torch.Tensor], torch.Tensor | None], torch.Tensor]

bnb: Any = bitsandbytes  # it has no types


class WeightOnlyLinear8bitLt(bnb.nn.Linear8bitLt):  # type: ignore[misc]
    """A `Linear8bitLt` that never quantises activations: the same product in training and evaluation."""

    multiply: Product
    dense: Callable[[torch.Tensor, torch.Tensor, torch.dtype], torch.Tensor]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Product with the dequantised weight, (..., d_out)."""
        if self.weight.CB is not None:
            self.init_8bit_state()
        codes, absmax, dtype = self.state.CB, self.state.SCB, x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return self.multiply(x, lambda: self.dense(codes, absmax, dtype), bias)


class WeightOnlyLinear4bit(bnb.nn.Linear4bit):  # type: ignore[misc]
    """A `Linear4bit` that never repacks its weight: the same product in training and evaluation, on every processor."""

    multiply: Product
    dense: Callable[[torch.Tensor, Any, torch.dtype], torch.Tensor]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Product with the dequantised weight in `compute_dtype`, (..., d_out), in the dtype of `x`."""
        bnb.nn.modules.fix_4bit_weight_quant_state_from_module(self)
        codes, state, dtype = self.weight.data, self.weight.quant_state, self.compute_dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return self.multiply(x.to(dtype), lambda: self.dense(codes, state, dtype), bias).to(x.dtype)


def linear_8bit(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    bias: torch.Tensor | None,
    layer: PackedLayer,
    *,
    dense: Callable[[torch.Tensor, torch.Tensor, torch.dtype], torch.Tensor],
) -> nn.Module:
    """A layer of 8 bits; bitsandbytes' own where the library's product is wanted.

    `dense` makes the weight (d_out, d_in) of codes, row maxima (d_out,) and a type.
    """
    d_out, d_in = layer.shape
    cls = bnb.nn.Linear8bitLt if layer.library_product else WeightOnlyLinear8bitLt
    module: Any = cls(d_in, d_out, bias=bias is not None, has_fp16_weights=False, device="meta")
    module.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=absmax)
    module.dense = dense
    return _finished(module, bias, layer)


def linear_4bit(
    codes: torch.Tensor,
    state: Any,
    bias: torch.Tensor | None,
    layer: PackedLayer,
    *,
    dense: Callable[[torch.Tensor, Any, torch.dtype], torch.Tensor],
) -> nn.Module:
    """A layer of 4 bits in the NormalFloat code, of codes and their `QuantState`.

    `dense` makes the weight (d_out, d_in) of codes, a state and a type.
    """
    d_out, d_in = layer.shape
    state.code = state.code.clone()
    module: Any = WeightOnlyLinear4bit(
        d_in,
        d_out,
        bias=bias is not None,
        compute_dtype=layer.dtype,
        compress_statistics=state.nested,
        quant_type="nf4",
        device="meta",
    )
    module.weight = bnb.nn.Params4bit(
        codes,
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type="nf4",
        module=module,
        bnb_quantized=True,
    )
    module.quant_state, module.dense = state, dense
    return _finished(module, bias, layer)


def _finished(module: Any, bias: torch.Tensor | None, layer: PackedLayer) -> nn.Module:
    module.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    module.multiply = layer.multiply
    made: nn.Module = module
    return made
