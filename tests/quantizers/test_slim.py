"""SLiM-LLM: which groups get more bits, what scales are taken, and the layout."""

from __future__ import annotations

import pytest
import torch

from qratk.core.errors import QuantizationError
from qratk.quantizers._compensation import inverse_factor
from qratk.quantizers.base import Moments, quantizers

SIZE = 16


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moments_of(x):
    return Moments(x.T @ x / len(x), x.abs().mean(dim=0), len(x))


def uneven(d_in, *, seed=0, tokens=512):
    """Inputs whose size differs between groups of columns."""
    return gaussian(tokens, d_in, seed=seed) * torch.logspace(-1, 1, d_in // SIZE).repeat_interleave(SIZE)


def packed_of(bits=2, shape=(24, 128), **options):
    quantizer = quantizers.create("slim", group_size=SIZE, **options)
    weight, moments = gaussian(*shape), moments_of(uneven(shape[1]))
    return quantizer, weight, moments, quantizer.quantize_calibrated(weight, bits, moments)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_as_many_groups_gain_a_bit_as_lose_one_by_salience(bits):
    _, weight, moments, packed = packed_of(bits)
    widths = packed["widths"].tolist()
    assert sorted(set(widths)) == [bits - 1, bits, bits + 1] or sorted(set(widths)) == [bits - 1, bits + 1]
    assert sum(widths) == bits * len(widths)
    factor = inverse_factor(moments.second.double(), 0.01)
    salience = (weight.square() / factor.diagonal().square()).sum(0).reshape(-1, SIZE).sum(1)
    assert widths == sorted(widths)  # inputs rise, and salience with them
    assert torch.equal(salience.argsort(), torch.arange(len(widths)))


def test_the_number_of_groups_that_change_is_that_of_the_least_output_error():
    quantizer, weight, moments, packed = packed_of(3)
    groups = len(packed["widths"])
    factor = inverse_factor(moments.second.double(), 0.01).float().diagonal().square()
    errors = []
    for k in range(groups // 2 + 1):
        widths = [2] * k + [3] * (groups - 2 * k) + [4] * k  # salience rises
        codes, scale, zero = quantizer._nearest(weight, widths, factor)
        dense = (codes - zero.repeat_interleave(SIZE, 1)) * scale.repeat_interleave(SIZE, 1)
        errors.append(float((((weight - dense) @ moments.second) * (weight - dense)).sum()))
    assert packed["widths"].tolist().count(4) == errors.index(min(errors)) > 0


def test_equal_groups_keep_equal_bits():
    quantizer = quantizers.create("slim", group_size=SIZE)
    weight = gaussian(24, SIZE).repeat(1, 8)
    packed = quantizer.quantize_calibrated(weight, 3, Moments(torch.eye(128), torch.ones(128), 10))
    assert set(packed["widths"].tolist()) == {3}


@pytest.mark.parametrize("bits", [2, 3])
def test_output_error_is_lower_than_with_equal_bits(bits):
    _, weight, moments, _ = packed_of(bits)
    x, errors = uneven(128, seed=9), {}
    for name, options in (("slim", {}), ("gptq", {}), ("affine_gptq", {"clip": "none"})):
        quantizer = quantizers.create(name, group_size=SIZE, **options)
        packed = quantizer.quantize_calibrated(weight, bits, moments)
        dense = quantizer.dequantize(packed, (24, 128), bits, torch.float32)
        errors[name] = float((x @ (weight - dense).T).square().sum())
    assert errors["slim"] < 0.6 * min(errors["gptq"], errors["affine_gptq"])


def test_bytes_are_those_of_the_nominal_bits_whatever_the_groups_have():
    quantizer, weight, _, packed = packed_of(3)
    assert packed["codes"].numel() == weight.numel() * 3 // 8
    assert packed["zero"].numel() == 24 * 8 * 3 // 8
    assert packed["scale"].shape == (24, 8)
    expected = quantizer.packed_bytes((24, 128), 3)
    assert expected.total == sum(tensor.nbytes for tensor in packed.values())


def test_the_weight_is_read_group_by_group():
    quantizer, _, _, packed = packed_of(2)
    dense = quantizer.dequantize(packed, (24, 128), 2, torch.float32)
    rows = [int.from_bytes(bytes(row.tolist()), "little") for row in packed["codes"]]
    zeros = int.from_bytes(bytes(packed["zero"].tolist()), "little")
    bit = zero_bit = 0
    for group, width in enumerate(packed["widths"].tolist()):
        for row in range(24):
            zero = 0.5 if width == 1 else zeros >> (zero_bit + row * width) & (2**width - 1)
            codes = [rows[row] >> (bit + i * width) & (2**width - 1) for i in range(SIZE)]
            expected = (torch.tensor(codes) - zero) * packed["scale"][row, group].float()
            assert torch.equal(dense[row, group * SIZE : (group + 1) * SIZE], expected)
        bit, zero_bit = bit + SIZE * width, zero_bit + 24 * width


def test_groups_of_one_bit_are_signs_times_the_mean_size():
    quantizer, weight = quantizers.create("slim", group_size=SIZE), gaussian(8, SIZE)
    codes, scale, zero = quantizer._nearest(weight, [1], torch.ones(SIZE))
    mean = weight.abs().mean(dim=1, keepdim=True).half().float()
    torch.testing.assert_close((codes - zero) * scale, weight.sign() * mean, rtol=1e-3, atol=0)


def test_the_scale_is_that_of_the_least_sum_of_both_norms():
    quantizer, weight = quantizers.create("slim", group_size=64, range=0.3), gaussian(32, 64)
    weight[:, 3] *= 6  # salient
    scaled = torch.ones(64)
    scale, zero = quantizer._grid(weight, 3, scaled)
    salience = weight.square()
    salient = salience > salience.mean() + 3 * salience.std()
    assert 0 < int(salient.sum()) < 64
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)

    def cost(row, step, offset):
        codes = (weight[row] / step + offset).round().clamp(0, 7)
        squares = ((codes - offset) * step - weight[row]).square()
        return float(squares[salient[row]].sum().sqrt() + squares[~salient[row]].sum().sqrt())

    for row in range(32):
        exact = float(-low[row] / (high[row] - low[row]) * 7)
        steps = [((1 + 0.3 * i / 20) * (high[row] - low[row]) / 7).half().float() for i in range(-20, 21)]
        tried = min(cost(row, step, offset) for step in steps for offset in (exact // 1, exact // 1 + 1))
        assert cost(row, scale[row], zero[row]) == pytest.approx(tried, rel=1e-4)


def test_shapes_that_do_not_divide_are_refused_and_smaller_groups_offered():
    quantizer = quantizers.create("slim")
    for shape in ((17, 64), (64, 96)):
        with pytest.raises(QuantizationError, match="'slim': a weight of"):
            quantizer.check(shape, 2)
    assert [other.group_size for other in quantizer.alternatives()] == [32, 16, 8]
