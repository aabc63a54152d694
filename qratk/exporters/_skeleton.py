"""A Hugging Face model without weights, to be filled with those of a backbone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qratk.backbone.layers import is_conv1d

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qratk.backbone.backbone import Backbone


def empty_like(backbone: Backbone) -> PreTrainedModel:
    """A model of the backbone's class and configuration: parameters on the meta device, buffers real.

    It generates as the original does: where an answer ends, a chat model says there alone.
    """
    model = empty_model(type(backbone.base), backbone.config)
    generation = getattr(backbone.base, "generation_config", None)
    if generation is not None:
        model.generation_config = copy.deepcopy(generation)
    return model


def empty_model(cls: Any, config: Any) -> PreTrainedModel:
    """A model of a class (or of `AutoModelForCausalLM`): parameters on the meta device, buffers real, in eval mode.

    Buffers that are not stored, such as rotary frequencies, are computed when a model is built: so they must be real.
    """
    from accelerate import init_empty_weights

    make = getattr(cls, "from_config", None) or cls._from_config
    with init_empty_weights(include_buffers=False):
        model: Any = make(config)
    evaluated: PreTrainedModel = model.eval()
    return evaluated


def fill(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put copies of tensors in place by name, then tie what the model ties."""
    for name, tensor in tensors.items():
        parent, _, attribute = name.rpartition(".")
        module: nn.Module = model.get_submodule(parent)
        if attribute in module._parameters:
            module._parameters[attribute] = nn.Parameter(tensor.clone(), requires_grad=False)
        else:
            module._buffers[attribute] = tensor.clone()
    model.tie_weights()


def is_turned(backbone: Backbone) -> Callable[[str], bool]:
    """Tells of a projection's name whether its weight is (d_in, d_out) in the original model, as GPT-2's is."""
    model = empty_model(type(backbone.base), backbone.config)
    return lambda name: is_conv1d(model.get_submodule(name))


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in place by qualified name."""
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)
