"""GPTQ and AWQ against slower implementations, and against rounding to nearest."""

from __future__ import annotations

import pytest
import torch

from qratk.core.errors import ConfigurationError, QuantizationError
from qratk.quantizers._compensation import inverse_factor
from qratk.quantizers.awq import channel_scales
from qratk.quantizers.base import Moments, quantizers


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moments_of(x):
    return Moments(x.T @ x / len(x), x.abs().mean(dim=0), len(x))


def correlated(d_in, *, seed=0, tokens=512):
    """Inputs that lie near a space of a quarter of the dimensions."""
    mixing = gaussian(d_in // 4, d_in, seed=seed + 1)
    return gaussian(tokens, d_in // 4, seed=seed) @ mixing + 0.1 * gaussian(tokens, d_in, seed=seed + 2)


def salient(d_in, *, seed=0, tokens=512):
    """Independent inputs, a few of them thirty times as large as the others."""
    x = gaussian(tokens, d_in, seed=seed)
    x[:, :: d_in // 4] *= 30
    return x


def output_error(quantizer, packed, weight, x, bits):
    residual = weight - quantizer.dequantize(packed, tuple(weight.shape), bits, torch.float32)
    return float((x @ residual.T).square().sum(dim=1).mean())


def errors(quantizer, x_of, bits, *, d_in=64, seeds=range(4)):
    """Mean output error when calibrated, and when rounded to nearest, over weights; on new tokens too."""
    totals = torch.zeros(3)
    for seed in seeds:
        weight, x = 0.05 * gaussian(48, d_in, seed=100 + seed), x_of(d_in, seed=10 * seed)
        fitted = quantizer.quantize_calibrated(weight, bits, moments_of(x[:384]))
        nearest = quantizer.quantize(weight, bits)
        totals += torch.tensor(
            [
                output_error(quantizer, fitted, weight, x[:384], bits),
                output_error(quantizer, fitted, weight, x[384:], bits),
                output_error(quantizer, nearest, weight, x[384:], bits),
            ]
        )
    return totals.tolist()


@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_halves_the_output_error_of_rounding_on_correlated_inputs(bits, activation_order):
    quantizer = quantizers.create("gptq", group_size=32, activation_order=activation_order)
    seen, unseen, nearest = errors(quantizer, correlated, bits)
    assert seen < 0.5 * nearest
    assert unseen < 0.5 * nearest


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_awq_lowers_the_output_error_of_rounding_where_channels_stand_out(bits):
    seen, unseen, nearest = errors(quantizers.create("awq", group_size=32), salient, bits)
    assert seen < 0.7 * nearest
    assert unseen < 0.7 * nearest


@pytest.mark.parametrize("bits", [2, 4])
def test_awq_is_never_worse_than_rounding_on_its_own_tokens(bits):
    quantizer = quantizers.create("awq", group_size=16)
    for seed in range(4):
        weight, x = gaussian(16, 32, seed=seed), gaussian(64, 32, seed=seed + 50)
        fitted = quantizer.quantize_calibrated(weight, bits, moments_of(x))
        nearest = output_error(quantizer, quantizer.quantize(weight, bits), weight, x, bits)
        assert output_error(quantizer, fitted, weight, x, bits) <= nearest * 1.0001


def brain_surgeon(weight, second, bits, size, damping, quantizer, order):
    """GPTQ as its derivation has it: after each column, the optimal update of the rest (Frantar et al., Eq. 2-3).

    The inverse of what is left is taken anew for every column; no factor, no blocks.
    """
    weight, d_in = weight.double().clone(), weight.shape[1]
    hessian = second.double() + damping * second.double().diagonal().mean() * torch.eye(d_in)
    grids = {g: quantizer._grid(weight[:, g * size : (g + 1) * size].float(), bits) for g in range(d_in // size)}
    dense, left = torch.zeros_like(weight), list(order)
    while left:
        column = left[0]
        group = column // size
        if list(order) == sorted(order) and column % size == 0:
            grids[group] = quantizer._grid(weight[:, column : column + size].float(), bits)
        scale, zero = (t[:, 0].double() for t in grids[group])
        codes = (weight[:, column] / scale + zero).round().clamp(0, 2**bits - 1)
        dense[:, column] = (codes - zero) * scale
        inverse = torch.linalg.inv(hessian[left][:, left])
        error = (weight[:, column] - dense[:, column]) / inverse[0, 0]
        weight[:, left] -= torch.outer(error, inverse[0])
        left = left[1:]
    return dense.float()


@pytest.mark.parametrize("size", [8, 32])
@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_gptq_is_the_optimal_update_after_each_column(bits, activation_order, size, monkeypatch):
    monkeypatch.setattr("qratk.quantizers._compensation._BLOCK", 16)  # several blocks
    quantizer = quantizers.create("gptq", group_size=size, activation_order=activation_order, metadata_dtype="float32")
    weight, moments = gaussian(12, 64), moments_of(correlated(64))
    order = list(range(64))
    if activation_order:
        order = torch.argsort(moments.second.diagonal(), descending=True, stable=True).tolist()
    expected = brain_surgeon(weight, moments.second, bits, size, 0.01, quantizer, order)
    packed = quantizer.quantize_calibrated(weight, bits, moments)
    found = quantizer.dequantize(packed, (12, 64), bits, torch.float32)
    # A tie that rounds the other way changes what follows in its row.
    rows = (found - expected).abs().amax(dim=1) < 1e-3
    assert int(rows.sum()) >= 11


@pytest.mark.parametrize("activation_order", [False, True])
def test_gptq_of_independent_inputs_is_rounding_to_nearest(activation_order):
    quantizer = quantizers.create("gptq", group_size=16, activation_order=activation_order)
    weight = gaussian(16, 64)
    moments = Moments(torch.diag(torch.linspace(0.5, 2, 64)), torch.ones(64), 10)
    found, nearest = quantizer.quantize_calibrated(weight, 3, moments), quantizer.quantize(weight, 3)
    assert all(torch.equal(found[name], nearest[name]) for name in nearest)


def test_inputs_that_were_never_seen_keep_their_weights():
    quantizer, weight, x = quantizers.create("gptq", group_size=16), gaussian(8, 32), correlated(32)
    x[:, 5] = 0
    packed = quantizer.quantize_calibrated(weight, 8, moments_of(x))
    dense = quantizer.dequantize(packed, (8, 32), 8, torch.float32)
    torch.testing.assert_close(dense[:, 5], weight[:, 5], atol=0.03, rtol=0)


@pytest.mark.parametrize("name", ["gptq", "awq", "affine_gptq", "slim"])
def test_a_projection_that_no_token_reached_is_rounded_to_nearest(name):
    quantizer, weight = quantizers.create(name, group_size=16), gaussian(8, 32)
    packed = quantizer.quantize_calibrated(weight, 4, Moments(torch.zeros(32, 32), torch.zeros(32), 0))
    nearest = quantizer.quantize(weight, 4)
    assert all(torch.equal(packed[part], nearest[part]) for part in nearest)


def test_factor_is_that_of_the_damped_inverse_and_of_a_singular_matrix_too():
    x = correlated(16, tokens=40)
    second = (x.T @ x / 40).double()
    factor = inverse_factor(second, 0.01)
    damped = second + 0.01 * second.diagonal().mean() * torch.eye(16)
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(16).double(), rtol=1e-6, atol=1e-6)
    assert torch.equal(factor, factor.triu())
    one = torch.ones(16, 1).double()
    assert inverse_factor(one @ one.T, 1e-17).isfinite().all()
    with pytest.raises(QuantizationError, match="positive"):
        inverse_factor(torch.diag(torch.tensor([1.0, -1e6])).double() + 1e6 * torch.eye(2).double().flip(0), 0.01)


def test_awq_takes_the_best_alpha_of_its_grid():
    quantizer, weight, x = quantizers.create("awq", group_size=16, grid=4), gaussian(16, 32), salient(32)
    moments = moments_of(x)
    found = output_error(quantizer, quantizer.quantize_calibrated(weight, 3, moments), weight, x, 3)
    tried = []
    for alpha in (0.0, 0.25, 0.5, 0.75, 1.0):
        s = moments.magnitude**alpha
        s = (s / (s.max() * s.min()).sqrt()).half().float()
        plain = quantizers.create("gptq", group_size=16)  # the same grid, without channels
        dense = plain.dequantize(plain.quantize(weight * s, 3), (16, 32), 3, torch.float32) / s
        tried.append(float((x @ (weight - dense).T).square().sum(dim=1).mean()))
    assert found == pytest.approx(min(tried), rel=1e-3)
    assert min(tried) < 0.9 * tried[0]


def test_channel_scales_lie_within_float16_and_begin_at_one():
    magnitude = torch.tensor([1e-12, 1.0, 1e6, 0.0])
    for alpha in (0.0, 0.5, 1.0):
        scales = channel_scales(magnitude, alpha)
        assert scales.dtype == torch.float16
        assert scales.isfinite().all()
        assert (scales > 0).all()
        assert float(scales.max() * scales.min()) == pytest.approx(1.0, rel=1e-2)
    assert torch.equal(channel_scales(magnitude, 0.0), torch.ones(4).half())
    expected = torch.tensor([1.0, 4.0]) ** 0.5 / 2**0.5
    torch.testing.assert_close(channel_scales(torch.tensor([1.0, 4.0]), 0.5).float(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_awq_divides_its_channels_out_in_16_bits_too(dtype):
    quantizer, weight, x = quantizers.create("awq", group_size=16), gaussian(16, 32), salient(32)
    packed = quantizer.quantize_calibrated(weight, 8, moments_of(x))
    assert packed["channel"].unique().numel() > 1
    dense = quantizer.dequantize(packed, (16, 32), 8, dtype)
    assert dense.dtype == dtype
    exact = quantizer.dequantize(packed, (16, 32), 8, torch.float32)
    assert float((dense.float() - exact).norm() / exact.norm()) < 0.01


@pytest.mark.parametrize("name", ["gptq", "awq", "affine_gptq", "slim"])
def test_moments_of_another_weight_or_not_finite_are_refused(name):
    quantizer, weight = quantizers.create(name, group_size=16), gaussian(8, 32)
    with pytest.raises(QuantizationError, match="not those of the 32 inputs"):
        quantizer.quantize_calibrated(weight, 4, moments_of(gaussian(9, 16)))
    bad = moments_of(gaussian(9, 32))
    bad.second[0, 0] = float("inf")
    with pytest.raises(QuantizationError, match="not all finite"):
        quantizer.quantize_calibrated(weight, 4, bad)


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_groups_lie_within_rows_and_smaller_ones_are_offered(name):
    quantizer = quantizers.create(name)
    with pytest.raises(QuantizationError, match=f"'{name}'.*rows of 96"):
        quantizer.check((64, 96), 4)
    assert [other.group_size for other in quantizer.alternatives()] == [32, 16, 8]
    quantizer.alternatives()[0].check((64, 96), 4)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gptq", {"damping": 0.0}),
        ("gptq", {"group_size": 1}),
        ("awq", {"grid": 0}),
        ("awq", {"metadata_dtype": "int8"}),
        ("affine", {"group_size": 1}),
        ("affine", {"metadata_dtype": "float32"}),
        ("affine", {"clip": "best"}),
        ("affine_gptq", {"damping": 0.0}),
        ("slim", {"group_size": 12}),
        ("slim", {"range": 1.0}),
        ("slim", {"damping": 2.0}),
        ("slim", {"metadata_dtype": "float32"}),
    ],
)
def test_options_out_of_range_are_refused(name, options):
    with pytest.raises(ConfigurationError):
        quantizers.create(name, **options)


def test_only_those_are_calibrated():
    calibrated = [name for name in quantizers.names() if quantizers.get(name).calibrated]
    assert calibrated == ["affine_gptq", "awq", "gptq", "slim"]
    hqq, weight = quantizers.create("hqq"), gaussian(16, 64)
    given, plain = hqq.quantize_calibrated(weight, 4, moments_of(gaussian(4, 64))), hqq.quantize(weight, 4)
    assert all(torch.equal(given[part], plain[part]) for part in plain)
