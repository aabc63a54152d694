"""Projection and adapter in one step of autograd: the outputs and gradients of PEFT's layer, to rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qratk.adapters.matrices import fused
from qratk.adapters.matrices.fused import AdaptedLinear, AdaptedMatmul, leave_to_peft
from qratk.backbone.backbone import Backbone
from qratk.core import Configuration

BackboneOf = Callable[..., Backbone]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the inputs that `AdaptedMatmul` was given."""
    seen: list[tuple[int, ...]] = []
    forward = AdaptedMatmul.forward

    def counting(ctx: Any, x: Tensor, *others: Any) -> Tensor:
        seen.append(tuple(x.shape))
        return forward(ctx, x, *others)

    monkeypatch.setattr(AdaptedMatmul, "forward", staticmethod(counting))
    return seen


def trained(backbone: Backbone, rank: int = 4) -> Backbone:
    """With adapters that do something."""
    backbone.activate(Configuration.uniform(4, rank, 3), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in backbone.trainable_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return backbone


def outputs(backbone: Backbone, batch: dict[str, Tensor]) -> list[Tensor]:
    """Logits and the gradients of all adapters."""
    parameters = [parameter for _, parameter in backbone.trainable_parameters()]
    logits = backbone.model(**batch, use_cache=False).logits.float()
    return [logits.detach(), *torch.autograd.grad(logits.logsumexp(-1).sum(), parameters)]


def far(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest distance as a share of the norm."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("cache", ["off", "on"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])  # the latter has biases
def test_in_bfloat16_it_is_about_as_near_to_exact_results_as_peft(
    family: str, cache: str, tiny_backbone: BackboneOf, tiny_batch: dict[str, Tensor], counted: list[tuple[int, ...]]
) -> None:
    exact = outputs(trained(tiny_backbone(family, bits=(4,), compute_dtype="float32")), tiny_batch)
    assert not counted  # small weights in float32
    backbone = trained(tiny_backbone(family, bits=(4,), compute_dtype="bfloat16"))
    backbone.dense_cache(cache)
    ours = outputs(backbone, tiny_batch)
    assert len(counted) == len(backbone.banks)
    assert [tensor.dtype for tensor in ours] == [torch.float32] * len(ours)
    leave_to_peft(backbone.base)
    assert far(ours, exact) < 1.7 * far(outputs(backbone, tiny_batch), exact)
    assert len(counted) == len(backbone.banks)


def test_large_weights_in_float32_are_fused_and_small_ones_stay_as_they_were(
    tiny_backbone: BackboneOf,
    tiny_batch: dict[str, Tensor],
    counted: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backbone = trained(tiny_backbone("llama", bits=(4,), compute_dtype="float32"))
    ours = outputs(backbone, tiny_batch)
    assert not counted
    monkeypatch.setattr(fused, "_LARGE", 0)
    large = outputs(backbone, tiny_batch)
    assert len(counted) == len(backbone.banks)
    leave_to_peft(backbone.base)
    theirs = outputs(backbone, tiny_batch)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert far(large, theirs) < 1e-5


def test_what_is_kept_for_the_backward_pass_is_less(tiny_backbone: BackboneOf, tiny_batch: dict[str, Tensor]) -> None:
    backbone = trained(tiny_backbone("llama", bits=(4,), compute_dtype="bfloat16"))

    def kept() -> int:
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs(backbone, tiny_batch)
        return sum(storages.values())

    ours = kept()
    leave_to_peft(backbone.base)
    assert ours < 0.8 * kept()


def _off(layer: Any) -> None:
    layer._disable_adapters = True


def _dropped(layer: Any) -> None:
    layer.lora_dropout[fused.ADAPTER] = nn.Dropout(0.5).train()


def _hooked(layer: Any) -> None:
    layer.lora_A[fused.ADAPTER].register_forward_hook(lambda *_: None)


def _none(layer: Any) -> None:
    layer.lora_A.pop(fused.ADAPTER)


@pytest.mark.parametrize("change", [_off, _dropped, _hooked, _none])
def test_what_is_out_of_the_ordinary_is_left_to_peft(
    change: Callable[[Any], None], tiny_backbone: BackboneOf, counted: list[tuple[int, ...]]
) -> None:
    backbone = trained(tiny_backbone("llama", bits=(4,), compute_dtype="bfloat16"))
    layer: Any = next(m for m in backbone.base.modules() if isinstance(m, AdaptedLinear))
    x = torch.randn(2, 3, layer.in_features).bfloat16()
    layer(x)
    assert len(counted) == 1
    change(layer)
    torch.manual_seed(0)
    out = layer(x)
    assert len(counted) == 1
    leave_to_peft(backbone.base)
    torch.manual_seed(0)
    assert torch.equal(out, layer(x))


def test_autocast_is_left_to_peft(tiny_backbone: BackboneOf, counted: list[tuple[int, ...]]) -> None:
    backbone = trained(tiny_backbone("llama", bits=(4,), compute_dtype="bfloat16"))
    layer: Any = next(m for m in backbone.base.modules() if isinstance(m, AdaptedLinear))
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(2, 3, layer.in_features).bfloat16())
    assert not counted


def test_a_switch_between_the_passes_does_not_change_the_gradient(tiny_backbone: BackboneOf) -> None:
    backbone = trained(tiny_backbone("llama", bits=(4, 8), compute_dtype="bfloat16"))
    layer: Any = next(m for m in backbone.base.modules() if isinstance(m, AdaptedLinear))
    x = torch.randn(2, 3, layer.in_features).bfloat16().requires_grad_()
    wanted = torch.autograd.grad(layer(x).sum(), x)[0]
    out = layer(x)
    layer.base_layer.activate(8)
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], wanted)
