"""A plain Hugging Face model whose projections are layers of bitsandbytes and hqq with the bank's own codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import bitsandbytes
import torch
from torch import nn

from qratk.bank.linear import BankLinear, Variant, dequantized_matmul
from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError, QuantizationError
from qratk.export.skeleton import empty_like, fill, replace_module
from qratk.quantizers._affine import AffineQuantizer
from qratk.quantizers.gptq import GPTQQuantizer
from qratk.quantizers.hqq import HQQQuantizer
from qratk.quantizers.int8 import Int8Quantizer
from qratk.quantizers.nf4 import NF4Quantizer
from qratk.quantizers.none import NoQuantizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qratk.backbone.backbone import Backbone


bnb: Any = bitsandbytes  # it has no types


def native_model(
    backbone: Backbone, configuration: Configuration, *, int8_activations: bool = False
) -> PreTrainedModel:
    """Plain Hugging Face model at a configuration: `Linear4bit`, `Linear8bitLt`, `HQQLinear` and `nn.Linear` layers.

    They hold copies of the bank's packed codes, so `PeftModel.from_pretrained(native_model(...), adapter_directory)`
    with an adapter written by `Backbone.save_adapter` gives the backbone's logits to the bit, on every processor. Two
    things of bitsandbytes stand against that in eval mode. `Linear8bitLt` quantises activations too (about 0.2 % on
    logits), on CUDA always; `Linear4bit` multiplies in bfloat16, with scales in bfloat16, on CPUs with AVX512-BF16
    (about 0.4 % on a layer), where it also repacks its weight in place and takes no layer whose outputs are no multiple
    of 32. The adapters were trained and scored without that, so the layers are `WeightOnlyLinear8bitLt` and
    `WeightOnlyLinear4bit`, subclasses that PEFT takes for the originals and that multiply by the dequantised weight in
    both modes. `int8_activations=True` gives the original at 8 bits, for whoever wants its speed more than equality.

    Raises `QuantizationError` when a projection is packed by a quantizer without a native layer, or is not in the bank
    at the wanted bits.
    """
    if len(configuration) != len(backbone.layers):
        raise ConfigurationError(
            f"the model has {len(backbone.layers)} layers, but the configuration has {len(configuration)}"
        )
    model: Any = empty_like(backbone)
    fill(model, backbone.fixed_tensors())
    for layer, choice in zip(backbone.layers, configuration.layers, strict=True):
        for name, bank in layer.modules:
            module = _native_layer(
                name, bank, bank.require(choice.bits, choice.rank), backbone.compute_dtype, int8_activations
            )
            replace_module(model, name, module)
    # PEFT dispatches hand-built bitsandbytes layers as such only on a model that is marked so.
    model.is_loaded_in_4bit = model.is_loaded_in_8bit = True
    native: PreTrainedModel = model.eval()
    return native


class WeightOnlyLinear8bitLt(bnb.nn.Linear8bitLt):  # type: ignore[misc]
    """A `Linear8bitLt` that never quantises activations: the same product in training and evaluation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Product with the dequantised weight, (..., d_out)."""
        if self.weight.CB is not None:
            self.init_8bit_state()
        codes, absmax = self.state.CB, self.state.SCB
        packed = {Int8Quantizer.CODES: codes, "absmax": absmax}
        shape = (self.out_features, self.in_features)
        dtype = x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return dequantized_matmul(x, lambda: Int8Quantizer().dequantize(packed, shape, 8, dtype), bias)


class WeightOnlyLinear4bit(bnb.nn.Linear4bit):  # type: ignore[misc]
    """A `Linear4bit` that never repacks its weight: the same product in training and evaluation, on every processor."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Product with the dequantised weight in `compute_dtype`, (..., d_out), in the dtype of `x`."""
        bnb.nn.modules.fix_4bit_weight_quant_state_from_module(self)
        state, dtype = self.weight.quant_state, self.compute_dtype
        quantizer = NF4Quantizer(state.blocksize, state.nested)
        packed = quantizer.packed_of(self.weight.data, state)
        shape = (self.out_features, self.in_features)
        bias = None if self.bias is None else self.bias.to(dtype)
        return dequantized_matmul(x.to(dtype), lambda: quantizer.dequantize(packed, shape, 4, dtype), bias).to(x.dtype)


def _native_layer(
    name: str, bank: BankLinear, variant: Variant, dtype: torch.dtype, int8_activations: bool
) -> nn.Module:
    makers: dict[type, Callable[[], Any]] = {
        NoQuantizer: lambda: _plain(bank, variant, dtype),
        Int8Quantizer: lambda: _int8(bank, variant, dtype, int8_activations),
        NF4Quantizer: lambda: _nf4(bank, variant, dtype),
        HQQQuantizer: lambda: _hqq(bank, variant, dtype),
        GPTQQuantizer: lambda: _hqq(bank, variant, dtype),  # the same codes, scales and zero points
    }
    maker = makers.get(type(variant.quantizer))
    if maker is None:
        raise QuantizationError(
            f"{name}: {type(variant.quantizer).__name__} has no native layer in PEFT; save the model in qratk's own "
            "format (`save_quantized`), or export dense weights (`merged_model`)"
        )
    module: Any = maker()
    # HQQLinear sets its sizes only when it quantises or loads.
    module.in_features, module.out_features = bank.in_features, bank.out_features
    finished: nn.Module = module.train(False)
    return finished


def _bias(bank: BankLinear, dtype: torch.dtype) -> nn.Parameter | None:
    return None if bank.bias is None else nn.Parameter(bank.bias.to(dtype, copy=True), requires_grad=False)


def _plain(bank: BankLinear, variant: Variant, dtype: torch.dtype) -> Any:
    module: Any = nn.Linear(bank.in_features, bank.out_features, bias=bank.bias is not None, device="meta")
    weight = variant.dequantize(bank.shape, dtype)
    module.weight = nn.Parameter(weight.clone(), requires_grad=False)
    module.bias = _bias(bank, dtype)
    return module


def _int8(bank: BankLinear, variant: Variant, dtype: torch.dtype, activations: bool) -> Any:
    cls = bnb.nn.Linear8bitLt if activations else WeightOnlyLinear8bitLt
    module = cls(bank.in_features, bank.out_features, bias=bank.bias is not None, has_fp16_weights=False, device="meta")
    codes, absmax = (variant.packed[key].clone() for key in (Int8Quantizer.CODES, "absmax"))
    module.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=absmax)
    module.bias = _bias(bank, dtype)
    return module


def _nf4(bank: BankLinear, variant: Variant, dtype: torch.dtype) -> Any:
    quantizer = variant.quantizer
    assert isinstance(quantizer, NF4Quantizer)
    packed = {key: tensor.clone() for key, tensor in variant.packed.items()}
    state = quantizer.quant_state(packed, bank.shape, dtype)
    state.code = state.code.clone()
    module: Any = WeightOnlyLinear4bit(
        bank.in_features,
        bank.out_features,
        bias=bank.bias is not None,
        compute_dtype=dtype,
        compress_statistics=quantizer.double_quantization,
        quant_type="nf4",
        device="meta",
    )
    module.weight = bnb.nn.Params4bit(
        packed[quantizer.CODES],
        requires_grad=False,
        quant_state=state,
        blocksize=quantizer.block_size,
        compress_statistics=quantizer.double_quantization,
        quant_type="nf4",
        module=module,
        bnb_quantized=True,
    )
    module.quant_state = state
    module.bias = _bias(bank, dtype)
    return module


def _hqq(bank: BankLinear, variant: Variant, dtype: torch.dtype) -> Any:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    quantizer = variant.quantizer
    assert isinstance(quantizer, AffineQuantizer)
    config: dict[str, Any] = BaseQuantizeConfig(nbits=variant.bits, group_size=quantizer.group_size, axis=1)
    module: Any = HQQLinear(None, config, compute_dtype=dtype, device=str(bank.device), initialize=False)
    module.W_q = variant.packed[quantizer.CODES].clone()
    module.meta = quantizer.library_meta(variant.packed, bank.shape, variant.bits, dtype)
    bias = _bias(bank, dtype)
    module.bias = None if bias is None else bias.detach()
    module.cuda(str(bank.device))  # the library's name for "to this device", CPU included
    module.ready = True
    return module
