"""The bank layer against dequantise-then-matmul."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from qratk.bank.linear import BankLinear, PackedVariant
from qratk.core.errors import QuantizationError
from qratk.quantizers.base import quantizers

QUANTIZERS = {2: "hqq", 3: "hqq", 4: "nf4", 8: "int8", 16: "none"}


def make_bank(*, bias=True, shape=(48, 64), dense_cache="off", dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtype)
    bank = BankLinear(
        weight, torch.randn(shape[0], generator=generator).to(dtype) if bias else None, dense_cache=dense_cache
    )
    for bits, name in QUANTIZERS.items():
        quantizer = quantizers.create(name)
        bank.add_variant(bits, PackedVariant(quantizer, bits, quantizer.quantize(weight, bits)))
    return bank


def inputs(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.parametrize("bits", sorted(QUANTIZERS))
@pytest.mark.parametrize("shape", [(5, 64), (2, 7, 64), (64,)])
def test_forward_and_backward_equal_dequantise_then_matmul_to_the_bit(bits, shape):
    bank = make_bank(bias=bits > 3)  # hqq adds its bias afterwards: see the next test
    bank.activate(bits)
    x, y = inputs(*shape), inputs(*shape)
    weight = bank.dequantized(bits)
    ours, expected = bank(x), nn.functional.linear(y, weight, bank.bias)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    ours.backward(grad)
    expected.backward(grad)
    assert torch.equal(ours, expected)
    assert torch.equal(x.grad, y.grad)


def test_bias_over_hqq_codes_is_added_as_the_library_does():
    bank = make_bank()
    bank.activate(2)
    x = inputs(5, 64)
    assert torch.equal(bank(x), torch.matmul(x, bank.dequantized(2).t()) + bank.bias)


@pytest.mark.parametrize("mode", ["on", "auto"])
@pytest.mark.parametrize("bits", sorted(QUANTIZERS))
def test_dense_cache_changes_nothing_but_speed(bits, mode):
    plain, cached = make_bank(), make_bank(dense_cache=mode)
    for bank in (plain, cached):
        bank.activate(bits)
    for _ in range(2):
        x, y = inputs(5, 64), inputs(5, 64)
        a, b = plain(x), cached(y)
        a.square().sum().backward()
        b.square().sum().backward()
        assert torch.equal(a, b)
        assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("mode", ["on", "auto"])
def test_a_switch_and_back_finds_the_kept_weight_again(mode):
    bank = make_bank(dense_cache=mode)
    bank.activate(2)
    x = inputs(3, 64)
    low, kept = bank(x), bank.dense_weight(2, torch.float32)
    bank.activate(8)
    assert not torch.equal(bank(x), low)
    bank.activate(2)
    assert torch.equal(bank(x), low)
    assert bank.dense_weight(2, torch.float32) is kept


def test_dense_weights_are_kept_where_they_lie_and_made_anew_elsewhere():
    bank = make_bank(dense_cache="on")
    bank.activate(8)
    kept = bank.dense_weight(8, torch.float32)
    assert bank.to("cpu").dense_weight(8, torch.float32) is kept
    assert bank.to("meta").dense_weight(8, torch.float32).device.type == "meta"


def test_dense_weights_of_several_bit_widths_are_those_of_the_quantizers():
    bank = make_bank(dense_cache="off")
    for bits in QUANTIZERS:
        dense = bank.dense_weight(bits, torch.float32)
        assert torch.equal(dense, bank.dequantized(bits))
        assert bank.dense_weight(bits, torch.float32) is not dense  # nothing is kept
    with pytest.raises(QuantizationError, match="not 6"):
        bank.dense_weight(6, torch.float32)


def test_a_replaced_variant_is_not_answered_from_the_cache():
    bank = make_bank(dense_cache="on")
    before = bank.dense_weight(4, torch.float32)
    nf4 = quantizers.create("nf4")
    bank.add_variant(4, PackedVariant(nf4, 4, nf4.quantize(-bank.reference, 4)))
    assert torch.equal(bank.dense_weight(4, torch.float32), bank.dequantized(4))
    assert not torch.equal(bank.dense_weight(4, torch.float32), before)


def test_no_dense_weight_is_kept_for_backward():
    bank = make_bank(shape=(512, 512))
    bank.activate(4)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        bank(inputs(3, 512))
    assert saved == []


def test_a_switch_between_forward_and_backward_leaves_the_gradient_alone():
    bank = make_bank()
    bank.activate(2)
    x = inputs(5, 64)
    out = bank(x)
    bank.activate(8)
    out.sum().backward()
    assert torch.equal(x.grad, torch.ones(5, 48) @ bank.dequantized(2))


def test_hooks_see_inputs_and_output_gradients():
    bank, seen = make_bank(), {}
    bank.activate(16)

    def forward_hook(module, args, out):
        seen["input"] = args[0].detach()
        out.register_hook(lambda grad: seen.update(grad=grad.detach()) and None)

    bank.register_forward_hook(forward_hook)
    x = inputs(5, 64)
    bank(x).square().sum().backward()
    weight = bank.dequantized(16).requires_grad_()
    nn.functional.linear(x.detach(), weight, bank.bias).square().sum().backward()
    torch.testing.assert_close(seen["grad"].t() @ seen["input"], weight.grad)


def test_a_change_of_dtype_leaves_packed_tensors_alone():
    bank = make_bank()
    before = {b: {k: t.dtype for k, t in v.packed.items()} for b, v in bank.variants.items()}
    moved = nn.Sequential(bank).to(torch.float16)[0]
    assert {b: {k: t.dtype for k, t in v.packed.items()} for b, v in moved.variants.items()} == before
    assert moved.reference.dtype == torch.float32


def test_a_move_takes_every_tensor_along_and_keeps_shared_ones_shared():
    bank = make_bank(dtype=torch.bfloat16)
    assert bank.variants[16].packed["codes"].data_ptr() == bank.reference.data_ptr()
    bank.to("meta")
    tensors = [bank.reference, bank.bias, *(t for v in bank.variants.values() for t in v.packed.values())]
    assert {t.device.type for t in tensors} == {"meta"}


def test_packed_tensors_stay_out_of_parameters_buffers_and_state_dict():
    bank = make_bank()
    assert not list(bank.parameters())
    assert not list(bank.buffers())
    assert not bank.state_dict()


def test_copies_are_independent():
    bank = make_bank()
    other = copy.deepcopy(bank)
    other.activate(2)
    assert bank.active == 16
    assert torch.equal(other.dequantized(4), bank.dequantized(4))


def test_a_bit_width_that_is_not_there_is_refused_with_what_to_do():
    bank = make_bank()
    with pytest.raises(QuantizationError, match=r"build_bank\(\[6\]\)"):
        bank.activate(6)
    bank.release_reference()
    with pytest.raises(QuantizationError, match="load the model again"):
        bank.activate(6)
    with pytest.raises(QuantizationError, match="released"):
        _ = bank.reference


def test_assigning_the_weight_raises():
    bank = make_bank()
    bank.activate(4)
    assert torch.equal(bank.weight, bank.dequantized(4))
    assert type(bank.weight + 1) is torch.Tensor
    with pytest.raises(QuantizationError, match="would be lost"):
        bank.weight.data = torch.zeros(48, 64)
    with pytest.raises(QuantizationError, match="would be lost"):
        bank.weight.data += 1.0


def test_autocast_computes_in_the_lower_precision():
    bank = make_bank()
    bank.activate(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert bank(inputs(3, 64)).dtype == torch.bfloat16
