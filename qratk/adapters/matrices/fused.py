"""Projection and adapter as one step of autograd, where that is faster: less is kept, converted and passed through."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from qratk.bank.linear import BankLinear

ADAPTER: Final = "default"
"""The name that PEFT knows the adapter by."""
_LARGE: Final = 1 << 16
"""Numbers of a weight from which on float32 is fused: small models keep the last bit that they had with PEFT."""
_DEVICES: Final = ("cpu", "meta")  # the latter foretells memory


class AdaptedMatmul(torch.autograd.Function):
    """W x + s B A x with W frozen, in the type of x.

    PEFT's layer converts 16-bit inputs to float32, multiplies by the adapter there, scales, adds and converts back:
    each a tensor of the size of the inputs or outputs, some kept until the backward pass. Here the adapter's products
    are in the type of x, as W's are, with sums in float32 inside the multiplication, and added to W x in place. Kept
    for the backward pass are x and s A x. Masters and their gradients stay float32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, bank: BankLinear, scaling: float) -> Tensor:
        """Product (..., d_out) of x (..., d_in) with the bank's weight, a (r, d_in) and b (d_out, r), plus the bias."""
        ctx.dense = bank.weight_in_use(x.dtype)
        out: Tensor = bank(x)
        low = torch.mm(x.flatten(0, -2), a.to(x.dtype).t()).mul_(scaling)
        out.view(-1, out.shape[-1]).addmm_(low, b.to(x.dtype).t())
        ctx.save_for_backward(x, a, b, low)
        ctx.scaling = scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        """Gradients of x, a and b."""
        x, a, b, low = ctx.saved_tensors
        outer = grad.flatten(0, -2)
        grad_low = torch.mm(outer, b.to(grad.dtype)).mul_(ctx.scaling)
        grad_a = torch.mm(grad_low.t(), x.flatten(0, -2)).to(a.dtype)
        grad_b = torch.mm(low.t(), outer).t().to(b.dtype)  # the other way round takes up to twice as long
        if not ctx.needs_input_grad[0]:
            return None, grad_a, grad_b, None, None
        grad_x = torch.mm(outer, ctx.dense())
        grad_x.addmm_(grad_low, a.to(grad.dtype))
        return grad_x.view(x.shape), grad_a, grad_b, None, None


class AdaptedLinear(Linear):
    """PEFT's layer round a projection of the bank, which multiplies by `AdaptedMatmul` where that gives the same.

    On the CPU, in bfloat16 or with a large weight in float32. Whatever is out of the ordinary is left to PEFT: adapters
    that are off or of another kind than two plain matrices, dropout, hooks on the matrices, sharded ones, autocast.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Product (..., d_out) of x (..., d_in)."""
        pair = None if args or kwargs else self._pair(x)
        if pair is None:
            out: Tensor = super().forward(x, *args, **kwargs)
            return out
        function: Any = AdaptedMatmul
        fused: Tensor = function.apply(x, *pair, self.base_layer, self.scaling[ADAPTER])
        return fused

    def _pair(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """A and B if they can be multiplied by at once."""
        bank: Any = self.base_layer
        if x.device.type not in _DEVICES or x.dim() < 2:
            return None
        if x.dtype != torch.bfloat16 and (x.dtype != torch.float32 or bank.in_features * bank.out_features < _LARGE):
            return None
        if self._disable_adapters or self.merged_adapters or self.lora_variant or ADAPTER not in self.lora_A:
            return None
        if self.active_adapters != [ADAPTER] or (x.device.type == "cpu" and torch.is_autocast_enabled("cpu")):
            return None
        dropout = self.lora_dropout[ADAPTER]
        if not isinstance(dropout, nn.Identity) and dropout.training:
            return None
        a: Any = self.lora_A[ADAPTER]
        b: Any = self.lora_B[ADAPTER]
        if not (_plain(a) and _plain(b)):
            return None
        return a.weight, b.weight


def fuse(layer: Any) -> None:
    """Have PEFT's layer for linear maps round a projection multiply as `AdaptedLinear`; any other stays as it is."""
    if type(layer) is Linear:
        layer.__class__ = AdaptedLinear


def leave_to_peft(model: nn.Module) -> None:
    """Undo `fuse` in all layers of a model."""
    module: Any
    for module in model.modules():
        if type(module) is AdaptedLinear:
            setattr(module, "__class__", Linear)  # noqa: B010  # the type of a wider class, for type checkers


def _plain(matrix: Any) -> bool:
    hooked = matrix._forward_hooks or matrix._forward_pre_hooks or matrix._backward_hooks or matrix._backward_pre_hooks
    plain = type(matrix) is nn.Linear and matrix.bias is None and type(matrix.weight) is nn.Parameter
    return plain and not hooked
