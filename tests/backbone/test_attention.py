"""Attention in bfloat16 on the CPU: the fused kernel's outputs, and gradients as near to the exact ones as its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from qratk.backbone import attention
from qratk.backbone.attention import NAME, ShortBackward, use_fused_backward
from qratk.backbone.backbone import Backbone


def inputs(length: int) -> list[Tensor]:
    """Query, key, value and the gradient of the output, (2, heads, T, 16), as projections make them."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, length, heads, 16, generator=generator).bfloat16().transpose(1, 2) for heads in (6, 2, 2, 6)]


def masks(length: int) -> dict[str, Tensor | None]:
    causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None].repeat(2, 1, 1, 1)
    causal[1, :, :, : length // 3] = False  # padding on the left: its rows see nothing
    causal[1, :, : length // 3, 0] = True
    added = torch.zeros(causal.shape, dtype=torch.bfloat16).masked_fill_(~causal, torch.finfo(torch.bfloat16).min)
    return {"none": None, "kept": causal, "added": added}


@pytest.mark.parametrize("kind", ["none", "kept", "added"])
def test_outputs_are_the_kernels_and_gradients_are_exact_to_rounding(kind: str) -> None:
    length, scale = 19, 0.3
    *tensors, grad = inputs(length)
    mask = masks(length)[kind]
    apply: Callable[..., Tensor] = ShortBackward.apply  # type: ignore[assignment]
    leaves = [tensor.requires_grad_() for tensor in tensors]
    out = apply(*leaves, mask, scale, mask is None)
    options: dict[str, Any] = {"attn_mask": mask, "is_causal": mask is None, "scale": scale, "enable_gqa": True}
    assert torch.equal(out, nn.functional.scaled_dot_product_attention(*leaves, **options))
    exact = [tensor.detach().double().requires_grad_() for tensor in leaves]
    if kind == "added":
        options["attn_mask"] = masks(length)["kept"]
    reference = nn.functional.scaled_dot_product_attention(*exact, **options)
    expected = torch.autograd.grad(reference, exact, grad.double())
    for found, wanted in zip(torch.autograd.grad(out, leaves, grad), expected, strict=True):
        assert found.dtype == torch.bfloat16
        assert (found - wanted).norm() < 6e-3 * wanted.norm()


def gradients(backbone: Backbone, batch: dict[str, Tensor]) -> list[Tensor]:
    parameters = [parameter for _, parameter in backbone.trainable_parameters()]
    logits = backbone.model(**batch, use_cache=False).logits
    return list(torch.autograd.grad(logits.float().logsumexp(-1).sum(), parameters))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the queries that `ShortBackward` was given."""
    seen: list[tuple[int, ...]] = []
    forward = ShortBackward.forward

    def counting(ctx: Any, query: Tensor, *others: Any) -> Tensor:
        seen.append(tuple(query.shape))
        return forward(ctx, query, *others)

    monkeypatch.setattr(ShortBackward, "forward", staticmethod(counting))
    return seen


def test_a_model_in_bfloat16_trains_by_it_and_in_float32_as_ever(
    tiny_backbone: Callable[..., Backbone], tiny_batch: dict[str, Tensor], counted: list[tuple[int, ...]]
) -> None:
    from qratk.core import Configuration

    found = {}
    for dtype, implementation in (("float32", "sdpa"), ("bfloat16", NAME), ("bfloat16", "sdpa")):
        backbone = tiny_backbone("llama", bits=(4,), compute_dtype=dtype)
        backbone.activate(Configuration.uniform(4, 4, 3), seed=0)
        with torch.no_grad():
            for name, parameter in backbone.trainable_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.05)
        if implementation == "sdpa":
            use_fused_backward(backbone.base)
        assert backbone.config._attn_implementation == implementation
        before = len(counted)
        found[dtype, implementation] = gradients(backbone, tiny_batch)
        assert len(counted) - before == (3 if implementation == NAME else 0)
        assert "sdpa" not in backbone.config.to_json_string()  # nothing of it is in what is saved
    for exact, ours, kernels in zip(*found.values(), strict=True):
        assert (ours - exact).norm() < 0.1 * exact.norm() + 1e-3
        assert (ours - kernels).norm() < 0.1 * exact.norm() + 1e-3


def test_what_is_out_of_the_ordinary_is_left_to_the_library(
    tiny_backbone: Callable[..., Backbone],
    tiny_batch: dict[str, Tensor],
    counted: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from qratk.core import Configuration

    backbone = tiny_backbone("llama", bits=(4,), compute_dtype="bfloat16")
    backbone.activate(Configuration.uniform(4, 4, 3), seed=0)
    assert backbone.config._attn_implementation == NAME
    with torch.no_grad():
        backbone.model(**tiny_batch, use_cache=False)
    with sdpa_kernel(SDPBackend.MATH):  # where derivatives are taken twice
        gradients(backbone, tiny_batch)
    monkeypatch.setattr(attention, "LONGEST", 11)
    gradients(backbone, tiny_batch)
    assert not counted
    monkeypatch.setattr(attention, "LONGEST", 12)
    gradients(backbone, tiny_batch)
    assert counted == [(2, 4, 12, 16)] * 3


def test_attention_that_is_not_the_librarys_own_is_left_alone(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    model.config._attn_implementation = "eager"
    assert Backbone.from_model(model, quantizers={}, compute_dtype="bfloat16").config._attn_implementation == "eager"
