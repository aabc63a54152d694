"""A plain Hugging Face model whose projections are layers of bitsandbytes and hqq with the bank's own codes."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from qratk.core.errors import ConfigurationError, QuantizationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qratk.backbone.backbone import Backbone
    from qratk.core.configuration import Configuration


def native_model(
    backbone: Backbone, configuration: Configuration, *, int8_activations: bool = False
) -> PreTrainedModel:
    """Plain Hugging Face model at a configuration: `Linear4bit`, `Linear8bitLt`, `HQQLinear` and `nn.Linear` layers.

    They hold copies of the bank's packed codes, so `PeftModel.from_pretrained(native_model(...), adapter_directory)`
    with an adapter written by `Backbone.save_adapter` gives the backbone's logits to the bit, whichever processor both
    run on: the layers of bitsandbytes are subclasses that PEFT takes for the originals, and that multiply by the
    dequantised weight in training and evaluation. `int8_activations=True` gives the original at 8 bits, which quantises
    activations too, for whoever wants its speed more than equality.

    Raises `QuantizationError` when a projection is packed by a quantizer without a native layer, or is not in the bank
    at the wanted bits.
    """
    from qratk.bank.linear import dequantized_matmul
    from qratk.exporters._skeleton import empty_like, fill, replace_module
    from qratk.quantizers.base import PackedLayer

    if len(configuration) != len(backbone.layers):
        raise ConfigurationError(
            f"the model has {len(backbone.layers)} layers, but the configuration has {len(configuration)}"
        )
    model: Any = empty_like(backbone)
    fill(model, backbone.fixed_tensors())
    for held, choice in zip(backbone.layers, configuration.layers, strict=True):
        for name, bank in held.modules:
            variant = bank.require(choice.bits, choice.rank)
            after = variant.quantizer.adds_bias_afterwards
            layer = PackedLayer(
                variant.packed,
                bank.shape,
                variant.bits,
                bank.bias,
                backbone.compute_dtype,
                multiply=partial(dequantized_matmul, after=after),
                library_product=int8_activations,
            )
            module = variant.quantizer.native_layer(layer)
            if module is None:
                raise QuantizationError(
                    f"{name}: {type(variant.quantizer).__name__} has no native layer in PEFT; export the model as "
                    "'packed' (qratk's own format) or as 'dense' weights"
                )
            replace_module(model, name, module.train(False))
    # PEFT dispatches hand-built bitsandbytes layers as such only on a model that is marked so.
    model.is_loaded_in_4bit = model.is_loaded_in_8bit = True
    native: PreTrainedModel = model.eval()
    return native
