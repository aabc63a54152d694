"""A model over weights that are read when they are multiplied by: what was written, without room for all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qratk.adapters.matrices.folder import Pair
from qratk.backbone.layers import is_conv1d, is_projection
from qratk.exporters._shards import Lazy
from qratk.exporters._skeleton import empty_model, fill, is_turned, replace_module

if TYPE_CHECKING:
    from qratk.backbone.backbone import Backbone


class ReadLinear(nn.Module):
    """x W^T plus a bias, in float32, with a weight (d_out, d_in) that is read anew in every pass."""

    def __init__(self, read: Callable[[], torch.Tensor], bias: torch.Tensor | None) -> None:
        super().__init__()
        self._read = read
        self._bias = None if bias is None else bias.float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Product (..., d_out) of x (..., d_in)."""
        bias = None if self._bias is None else self._bias.to(x.device)
        return nn.functional.linear(x, self._read().float().to(x.device), bias)


def reading_model(
    backbone: Backbone, config: Any, tensors: Lazy, *, pairs: Mapping[str, Pair] | None = None
) -> nn.Module:
    """A model of the backbone's class in float32: projections of tensors `NAME.weight`, read in every pass.

    The projections are those of the backbone; all else is filled at once. Weights of GPT-2's `Conv1D` are (d_in, d_out)
    in files, as transformers has them. Pairs are added to the weights.
    """
    model = empty_model(type(backbone.base), config)
    names = [name for name, module in model.named_modules() if is_projection(module) and name in backbone.banks]
    for name in names:
        bias = tensors.get(f"{name}.bias")
        read = _weight(tensors[f"{name}.weight"], is_conv1d(model.get_submodule(name)), (pairs or {}).get(name))
        replace_module(model, name, ReadLinear(read, None if bias is None else bias()))
    taken = {f"{name}.{part}" for name in names for part in ("weight", "bias")}
    rest = {name: read() for name, read in tensors.items() if name not in taken}
    fill(model, {name: t.float() if t.is_floating_point() else t for name, t in rest.items()})
    module: nn.Module = model
    return module.to(next(iter(backbone.fixed_tensors().values())).device)


def bank_tensors(backbone: Backbone) -> Lazy:
    """The active configuration without adapters, in float32 and named as in files."""
    turned = is_turned(backbone)
    found: dict[str, Callable[[], torch.Tensor]] = {}
    for name, tensor in backbone.fixed_tensors().items():
        found[name] = partial(_same, tensor)
    for name, bank in backbone.banks.items():
        dense = partial(bank.dequantized, bank.active, rank=bank.active_rank)
        found[f"{name}.weight"] = partial(_turned, dense) if turned(name) else dense
        if bank.bias is not None:
            found[f"{name}.bias"] = partial(_same, bank.bias)
    return found


def as_in_files(backbone: Backbone, tensors: Lazy, packed: Iterable[str]) -> Lazy:
    """Tensors with those of packed projections, (d_out, d_in) in every form, turned where dense files have them so."""
    turned = is_turned(backbone)
    back = {f"{n}.weight": partial(_turned, tensors[f"{n}.weight"]) for n in packed if turned(n)}
    return {**tensors, **back}


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _turned(read: Callable[[], torch.Tensor]) -> torch.Tensor:
    return read().t().contiguous()


def _weight(read: Callable[[], torch.Tensor], turned: bool, pair: Pair | None) -> Callable[[], torch.Tensor]:
    def weight() -> torch.Tensor:
        dense = read().t() if turned else read()
        return dense if pair is None else pair.added_to(dense)

    return weight
