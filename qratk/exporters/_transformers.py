"""The form `packed` as a quantisation method of transformers: layers that multiply by the dequantised weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qratk.bank.linear import dequantized_matmul
from qratk.core.errors import ConfigurationError
from qratk.exporters.packed import CODES, METHOD
from qratk.quantizers.base import Quantizer, quantizers


class PackedConfig(QuantizationConfigMixin):
    """`quantization_config` of `config.json`.

    Args:
        layouts: each with `quantizer` (`name` and `options`), `bits` as packed, `shape` (d_out, d_in) and `parts`, the
            type and shape of each tensor.
        projections: the number of the layout of each projection.
    """

    def __init__(
        self, layouts: list[dict[str, Any]] | None = None, projections: dict[str, int] | None = None, **others: Any
    ) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]  # transformers' own enumeration has no others
        self.layouts, self.projections = layouts or [], projections or {}


class PackedLinear(nn.Linear):
    """A frozen projection of packed tensors, which follow `.to(device)` and no change of type.

    PEFT wraps it as any `nn.Linear`. Merging an adapter into it is an error: its `weight` holds codes.
    """

    def __init__(self, quantizer: Quantizer, layout: Mapping[str, Any]) -> None:
        nn.Module.__init__(self)
        self.quantizer, self.bits = quantizer, int(layout["bits"])
        self.out_features, self.in_features = layout["shape"]
        self._parts = tuple(layout["parts"])
        for part, (dtype, shape) in layout["parts"].items():
            self.register_buffer(part, torch.empty(shape, dtype=getattr(torch, dtype), device="meta"))
        if "bias" not in layout["parts"]:
            self.register_parameter("bias", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Product (..., d_out) of x (..., d_in), plus the bias, in the type of x."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        packed = {_part(name): self._buffers[name] for name in self._parts if name != "bias"}
        shape, dtype = (self.out_features, self.in_features), x.dtype

        def dense() -> torch.Tensor:
            with torch.no_grad():
                return self.quantizer.dequantize(packed, shape, self.bits, dtype)  # type: ignore[arg-type]

        bias = None if self.bias is None else self.bias.to(dtype)
        return dequantized_matmul(x, dense, bias, after=self.quantizer.adds_bias_afterwards)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedLinear:
        def placed(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(placed, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        """Shape, bits and quantiser."""
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, quantizer={self.quantizer!r}"


def _part(name: str) -> str:
    """The quantiser's name of a tensor of a folder."""
    return Quantizer.CODES if name == CODES else name


class PackedHfQuantizer(HfQuantizer):
    """Puts `PackedLinear` layers in place before transformers reads the tensors into them."""

    requires_calibration = True  # it loads what is packed, and packs nothing
    quantization_config: PackedConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        made = [
            quantizers.create(layout["quantizer"]["name"], **layout["quantizer"]["options"])
            for layout in self.quantization_config.layouts
        ]
        for name, number in self.quantization_config.projections.items():
            parent, _, attribute = name.rpartition(".")
            try:
                holder = model.get_submodule(parent)
                holder.get_submodule(attribute)
            except AttributeError as error:
                raise ConfigurationError(
                    f"{type(model).__name__} has no projection {name!r}; load the folder by AutoModelForCausalLM"
                ) from error
            setattr(holder, attribute, PackedLinear(made[number], self.quantization_config.layouts[number]))
        return model

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        """Yes: the tensors are those of the folder."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters on it can be trained: yes."""
        return True


def enter(registry: Any) -> None:
    """Enter both classes into transformers' registry, unless they are."""
    if METHOD not in registry.AUTO_QUANTIZER_MAPPING:
        registry.register_quantization_config(METHOD)(PackedConfig)
        registry.register_quantizer(METHOD)(PackedHfQuantizer)


enter(auto)
