"""Layers of bitsandbytes that multiply by the dequantised weight in training and evaluation, on every processor.

In eval mode `Linear8bitLt` quantises activations too (about 0.2 % on logits), on CUDA always; `Linear4bit` multiplies
in bfloat16, with scales in bfloat16, on CPUs with AVX512-BF16 (about 0.4 % on a layer), where it also repacks its
weight in place and takes only whole blocks in a row and multiples of 32 outputs. Adapters are trained and scored
without that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import bitsandbytes
import torch
from torch import nn

if TYPE_CHECKING:
    from qratk.quantizers.base import PackedLayer
    from qratk.quantizers.int8 import Int8Quantizer
    from qratk.quantizers.nf4 import NF4Quantizer

bnb: Any = bitsandbytes  # it has no types


class WeightOnlyLinear8bitLt(bnb.nn.Linear8bitLt):  # type: ignore[misc]
    """A `Linear8bitLt` that never quantises activations: the same product in training and evaluation."""

    quantizer: Int8Quantizer
    multiply: Any

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Product with the dequantised weight, (..., d_out)."""
        if self.weight.CB is not None:
            self.init_8bit_state()
        packed = {self.quantizer.CODES: self.state.CB, "absmax": self.state.SCB}
        shape, dtype = (self.out_features, self.in_features), x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        out: torch.Tensor = self.multiply(x, lambda: self.quantizer.dequantize(packed, shape, 8, dtype), bias)
        return out


class WeightOnlyLinear4bit(bnb.nn.Linear4bit):  # type: ignore[misc]
    """A `Linear4bit` that never repacks its weight: the same product in training and evaluation, on every processor."""

    quantizer: NF4Quantizer
    multiply: Any

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Product with the dequantised weight in `compute_dtype`, (..., d_out), in the dtype of `x`."""
        bnb.nn.modules.fix_4bit_weight_quant_state_from_module(self)
        packed = self.quantizer.packed_of(self.weight.data, self.weight.quant_state)
        shape, dtype = (self.out_features, self.in_features), self.compute_dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        dense = lambda: self.quantizer.dequantize(packed, shape, 4, dtype)  # noqa: E731
        out: torch.Tensor = self.multiply(x.to(dtype), dense, bias)
        return out.to(x.dtype)


def linear_8bit(quantizer: Int8Quantizer, layer: PackedLayer) -> nn.Module:
    """A layer of 8 bits; bitsandbytes' own where the library's product is wanted."""
    bias, packed = layer.parameters()
    d_out, d_in = layer.shape
    cls = bnb.nn.Linear8bitLt if layer.library_product else WeightOnlyLinear8bitLt
    module: Any = cls(d_in, d_out, bias=bias is not None, has_fp16_weights=False, device="meta")
    codes, absmax = packed[quantizer.CODES], packed["absmax"]
    module.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=absmax)
    return _finished(module, bias, quantizer, layer)


def linear_4bit(quantizer: NF4Quantizer, layer: PackedLayer) -> nn.Module:
    """A layer of 4 bits in the NormalFloat code."""
    bias, packed = layer.parameters()
    d_out, d_in = layer.shape
    state = quantizer.quant_state(packed, layer.shape, layer.dtype)
    state.code = state.code.clone()
    double = quantizer.double_quantization
    module: Any = WeightOnlyLinear4bit(
        d_in,
        d_out,
        bias=bias is not None,
        compute_dtype=layer.dtype,
        compress_statistics=double,
        quant_type="nf4",
        device="meta",
    )
    module.weight = bnb.nn.Params4bit(
        packed[quantizer.CODES],
        requires_grad=False,
        quant_state=state,
        blocksize=quantizer.block_size,
        compress_statistics=double,
        quant_type="nf4",
        module=module,
        bnb_quantized=True,
    )
    module.quant_state = state
    return _finished(module, bias, quantizer, layer)


def _finished(
    module: Any, bias: torch.Tensor | None, quantizer: Int8Quantizer | NF4Quantizer, layer: PackedLayer
) -> nn.Module:
    module.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    module.quantizer, module.multiply = quantizer, layer.multiply
    made: nn.Module = module
    return made
