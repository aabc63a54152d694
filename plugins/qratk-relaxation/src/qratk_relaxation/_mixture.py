"""Projections that multiply by a mixture of packed weights, beside adapters whose rows pass rank gates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qratk import AdapterOptions, initial_a

if TYPE_CHECKING:
    from qratk import Backbone, BankLinear


@dataclass
class Weights:
    """The gates' weights in use, (L, rungs) each; one object that all projections look at."""

    bits: Tensor = field(default_factory=lambda: torch.empty(0))
    rank: Tensor = field(default_factory=lambda: torch.empty(0))


class MixtureMatmul(torch.autograd.Function):
    """x (sum_b p_b W_b)^T, with gradients of x and p.

    The packed weights are read one after another, in the backward pass again: no dense one is kept between them. The
    gradient of p_b is the inner product of W_b with that of the mixed weight.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: Tensor, dense: Sequence[Callable[[torch.dtype], Tensor]]) -> Tensor:
        """Product (..., d_out) of x (..., d_in) with p (rungs,) and as many dense weights (d_out, d_in)."""
        ctx.save_for_backward(x, p)
        ctx.dense = dense
        return nn.functional.linear(x, _mixed(dense, p, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Gradients of x, (..., d_in), and p, (rungs,)."""
        x, p = ctx.saved_tensors
        grad_x = grad @ _mixed(ctx.dense, p, grad.dtype) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None
        of_weight = (grad.flatten(0, -2).t() @ x.flatten(0, -2)).float()
        return grad_x, torch.stack([(of_weight * make(grad.dtype)).sum() for make in ctx.dense]).to(p), None


def _mixed(dense: Sequence[Callable[[torch.dtype], Tensor]], p: Tensor, dtype: torch.dtype) -> Tensor:
    total: Tensor | None = None
    for share, make in zip(p.tolist(), dense, strict=True):
        if share:
            total = make(dtype) * share if total is None else total.add_(make(dtype), alpha=share)
    assert total is not None, "the weights of a gate sum to 1"
    return total


class GatedLinear(nn.Module):
    """A projection with all bit-widths and ranks of the ladders at once, weighed by the gates of its layer.

    Args:
        name: of the projection; it seeds the adapter, as in fine-tuning.
        bank: its packed weights.
        layer: row of the gates.
        weights: the gates' weights in use.
        bits, ranks: the ladders.
        options: how adapters are scaled.
        seed: of the adapter.
    """

    def __init__(
        self,
        name: str,
        bank: BankLinear,
        layer: int,
        weights: Weights,
        bits: Sequence[int],
        ranks: Sequence[int],
        options: AdapterOptions,
        *,
        seed: int,
    ) -> None:
        super().__init__()
        self._bank = (bank,)  # not a submodule: the bank belongs to the backbone
        self._layer, self._weights = layer, weights
        self._dense = tuple(_reader(bank, width) for width in bits)
        largest = max(ranks)
        # Row j of an adapter is in use at every rank above j, and scaled as that rank is: (rungs, largest).
        open_rows = [[options.scaling(rank) if row < rank else 0.0 for row in range(largest)] for rank in ranks]
        self._open = torch.tensor(open_rows, device=bank.device).reshape(len(ranks), largest)
        self.lora_a: nn.Parameter | None = None
        self.lora_b: nn.Parameter | None = None
        if largest:
            a = initial_a(name, largest, bank.in_features, seed=seed)
            self.lora_a = nn.Parameter(a.to(bank.device))
            self.lora_b = nn.Parameter(torch.zeros(bank.out_features, largest, device=bank.device))

    @property
    def weight(self) -> Tensor:
        """As of the bank: for code that asks for its device or dtype."""
        return self._bank[0].weight

    @property
    def bias(self) -> Tensor | None:
        """As of the bank."""
        return self._bank[0].bias

    def forward(self, x: Tensor) -> Tensor:
        """Product (..., d_out) of x (..., d_in), in the dtype of x."""
        function: Any = MixtureMatmul
        out: Tensor = function.apply(x, self._weights.bits[self._layer], self._dense)
        if self.bias is not None:
            out = out + self.bias.to(out.dtype)
        if self.lora_a is None or self.lora_b is None:
            return out
        rows = self._weights.rank[self._layer] @ self._open  # (largest,)
        low = nn.functional.linear(x.to(self.lora_a.dtype), self.lora_a) * rows
        return out + nn.functional.linear(low, self.lora_b).to(out.dtype)


def _reader(bank: BankLinear, bits: int) -> Callable[[torch.dtype], Tensor]:
    bank.require(bits)
    return lambda dtype: bank.dense_weight(bits, dtype)


@contextmanager
def gated(
    backbone: Backbone, weights: Weights, bits: Sequence[int], ranks: Sequence[int], *, seed: int
) -> Iterator[list[nn.Parameter]]:
    """The model with gated projections in it, and the parameters of their adapters; as before afterwards."""
    base, options = backbone.base, backbone.adapters.options
    modules = {
        name: GatedLinear(name, bank, layer, weights, bits, ranks, options, seed=seed)
        for layer, held in enumerate(backbone.layers)
        for name, bank in held.modules
    }
    before = {name: base.get_submodule(name) for name in modules}
    modes = [(module, module.training) for module in backbone.model.modules()]
    for name, module in modules.items():
        _put(base, name, module)
    backbone.model.train()
    try:
        yield [parameter for module in modules.values() for parameter in module.parameters()]
    finally:
        for name, found in before.items():
            _put(base, name, found)
        for found, mode in modes:
            found.training = mode


def _put(base: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(base.get_submodule(parent), attribute, module)
