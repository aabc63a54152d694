"""Attention in bfloat16 on the CPU: forwards by the fused kernel, backwards by plain products where that is faster."""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

NAME: Final = "sdpa_short_backward"
LONGEST: Final = 128
"""Tokens up to which products of whole score matrices beat the fused backward pass."""


class ShortBackward(torch.autograd.Function):
    """Scaled dot product attention whose backward pass makes the scores anew and multiplies them as they are.

    torch's fused backward kernel in bfloat16 on the CPU takes 10.7 ms where this takes 2 (8 x 64 tokens, 9 heads of
    64). What is kept for it are the inputs; scores exist for one layer at a time. Softmax is in float32. Queries that
    share keys and values are rows of one product, so that these are neither repeated nor their gradients added up.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool
    ) -> Tensor:
        """Output (B, H, T, D) of query (B, H, T, D), key and value (B, K, T, D), H a multiple of K."""
        from transformers.integrations.sdpa_attention import repeat_kv

        ctx.save_for_backward(query, key, value, mask)
        ctx.scale, ctx.causal = scale, causal
        repeats = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, repeats), repeat_kv(value, repeats)
        return nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, scale=scale
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key and value."""
        query, key, value, mask = ctx.saved_tensors
        groups, length = key.shape[0] * key.shape[1], key.shape[2]
        q, upper = (each.reshape(groups, -1, each.shape[-1]) for each in (query, grad))
        k, v = (each.reshape(groups, length, -1) for each in (key, value))
        scores = torch.bmm(q, k.mT).float().mul_(ctx.scale)
        _hide(scores.view(*query.shape[:3], length), mask, causal=ctx.causal)
        shares = scores.softmax(-1)
        del scores
        of_value = torch.bmm(shares.to(q.dtype).mT, upper)
        along = torch.bmm(upper, v.mT).float()
        # The Jacobian of the softmax times the gradient of the shares.
        softened: Tensor = torch._softmax_backward_data(along, shares, -1, shares.dtype)
        of_scores = softened.mul_(ctx.scale).to(q.dtype)
        of_query, of_key = torch.bmm(of_scores, k), torch.bmm(of_scores.mT, q)
        return of_query.view(query.shape), of_key.view(key.shape), of_value.view(value.shape), None, None, None


def _hide(scores: Tensor, mask: Tensor | None, *, causal: bool) -> None:
    """Take out of scores (B, H, T, T), in place, what a mask or causality forbids; a mask of numbers is added."""
    least = torch.finfo(scores.dtype).min
    if mask is None and causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril_()
    if mask is not None and mask.dtype == torch.bool:
        scores.masked_fill_(~mask, least)
    elif mask is not None:
        scores.add_(mask)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers' attention by "sdpa" returns, (B, T, H, D), with a backward pass by products where that pays.

    Whatever is out of the ordinary is left to transformers: other types and devices, long sequences, dropout, biases,
    caches, and contexts in which the fused kernels are forbidden, as where derivatives are taken twice.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    length = query.shape[2]
    plain = not dropout and options.get("position_bias") is None and options.get("softcap") is None
    differentiated = torch.is_grad_enabled() and query.requires_grad
    if not (
        plain
        and differentiated
        and query.dtype == torch.bfloat16
        and query.device.type in ("cpu", "meta")  # the latter foretells memory
        and 1 < length == key.shape[2] <= LONGEST
        and query.shape[1] % key.shape[1] == 0
        and torch.backends.cuda.flash_sdp_enabled()  # type: ignore[no-untyped-call]
    ):
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **options
        )
        return found
    causal = attention_mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    function: Any = ShortBackward
    out: Tensor = function.apply(query, key, value, attention_mask, scale, causal)
    return out.transpose(1, 2).contiguous(), None


def use_short_backward(model: Any) -> None:
    """Have a model attend by `attend`; nothing happens for one whose attention is not transformers' own "sdpa"."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    able = getattr(model, "_supports_attention_backend", False) and not type(model).__module__.startswith(
        "transformers_modules"
    )
    if not able or getattr(model.config, "_attn_implementation", None) != "sdpa":
        return
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.config._attn_implementation = NAME


def use_fused_backward(model: Any) -> None:
    """Undo `use_short_backward`."""
    if getattr(model.config, "_attn_implementation", None) == NAME:
        model.config._attn_implementation = "sdpa"
