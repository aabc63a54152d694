"""Affine codes with whole zero points: the layout that servers read, and how grids are found."""

from __future__ import annotations

import pytest
import torch

from qratk.core.errors import QuantizationError
from qratk.quantizers.base import Moments, PackedLayer, quantizers
from qratk.quantizers.bitstream import pack_bits, pack_words, unpack_bits, unpack_words, words_of


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moments_of(x):
    return Moments(x.T @ x / len(x), x.abs().mean(dim=0), len(x))


def inputs(d_in, *, spread, seed=0, tokens=256):
    """Independent inputs, some of them larger than others by a factor."""
    x = gaussian(tokens, d_in, seed=seed)
    x[:, :: d_in // 4] *= spread
    return x


def output_error(quantizer, packed, weight, x, bits):
    residual = weight - quantizer.dequantize(packed, tuple(weight.shape), bits, torch.float32)
    return float((x @ residual.T).square().sum(dim=1).mean())


# Streams


@pytest.mark.parametrize("bits", range(1, 9))
def test_streams_begin_with_the_least_significant_bit(bits):
    codes = torch.randint(0, 2**bits, (3, 40), generator=torch.Generator().manual_seed(bits))
    stream = pack_bits(codes, bits)
    assert stream.shape == (3, 40 * bits // 8)
    assert torch.equal(unpack_bits(stream, bits).long(), codes)
    whole = int.from_bytes(bytes(stream[1].tolist()), "little")
    assert [whole >> (i * bits) & (2**bits - 1) for i in range(40)] == codes[1].tolist()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("count", [1, 17, 32, 45])
def test_words_hold_a_stream_of_any_length_and_zeros_at_its_end(bits, count):
    codes = torch.randint(0, 2**bits, (2, count), generator=torch.Generator().manual_seed(count))
    words = pack_words(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (2, words_of(count, bits))
    assert torch.equal(unpack_words(words, bits, count).long(), codes)
    whole = int.from_bytes(words[0].numpy().tobytes(), "little")
    assert whole >> (count * bits) == 0


# Layout


def read_as_compressed_tensors(packed, shape, bits, size, symmetric):
    """Weight by the rules of `pack-quantized`, one number at a time."""
    (d_out, d_in), mask = shape, 2**bits - 1

    def numbers(words, count):
        whole = int.from_bytes(words.contiguous().numpy().tobytes(), "little")
        return [whole >> (i * bits) & mask for i in range(count)]

    codes = torch.tensor([numbers(row, d_in) for row in packed["codes"]])
    scale = packed["scale"].float().repeat_interleave(size, dim=1)
    if symmetric:
        return (codes - 2 ** (bits - 1)) * scale
    zero = torch.tensor([numbers(column, d_out) for column in packed["zero"].t()]).t()
    return (codes - zero.repeat_interleave(size, dim=1)) * scale


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", ["affine", "affine_gptq"])
def test_tensors_are_those_that_compressed_tensors_reads(name, bits, symmetric):
    quantizer, weight = quantizers.create(name, group_size=32, symmetric=symmetric), gaussian(40, 96)
    for packed in (
        quantizer.quantize(weight, bits),
        quantizer.quantize_calibrated(weight, bits, moments_of(inputs(96, spread=9))),
    ):
        assert packed["codes"].shape == (40, 96 * bits // 32)
        assert packed["scale"].shape == (40, 3)
        assert symmetric or packed["zero"].shape == (40 * bits // 32 + (40 * bits % 32 > 0), 3)
        dense = quantizer.dequantize(packed, (40, 96), bits, torch.float32)
        assert torch.equal(read_as_compressed_tensors(packed, (40, 96), bits, 32, symmetric), dense)


def test_three_bits_take_three_bits_and_zero_points_as_many():
    quantizer = quantizers.create("affine", group_size=64)
    assert quantizer.packed_bytes((64, 128), 3).weights == 64 * 128 * 3 // 8
    assert quantizer.packed_bytes((64, 128), 3).metadata == 64 * 2 * 2 + 64 * 2 * 3 // 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_of_the_hqq_library_has_the_same_weight_to_the_bit(dtype):
    quantizer, weight = quantizers.create("affine", group_size=32), gaussian(48, 64)
    for bits in (2, 3, 4, 8):
        packed = quantizer.quantize(weight, bits)
        layer = PackedLayer(packed, (48, 64), bits, None, dtype, multiply=lambda *_: None)
        assert torch.equal(
            quantizer.native_layer(layer).dequantize(), quantizer.dequantize(packed, (48, 64), bits, dtype)
        )


def test_there_is_no_such_layer_where_groups_do_not_fill_bytes():
    quantizer, weight = quantizers.create("affine"), gaussian(17, 64)
    packed = quantizer.quantize(weight, 2)
    assert (
        quantizer.native_layer(PackedLayer(packed, (17, 64), 2, None, torch.float32, multiply=lambda *_: None)) is None
    )


def test_rows_that_do_not_divide_are_refused_and_smaller_groups_offered():
    quantizer = quantizers.create("affine", group_size=128)
    with pytest.raises(QuantizationError, match="'affine': rows of 96"):
        quantizer.check((64, 96), 4)
    assert [other.group_size for other in quantizer.alternatives()] == [64, 32, 16, 8]


# Grids


@pytest.mark.parametrize(("bits", "bound"), [(2, 0.36), (3, 0.18), (4, 0.09), (8, 0.0057)])
@pytest.mark.parametrize("scale", [1.0, 0.02])
def test_clipping_reaches_the_error_that_is_told_on_gaussian_weights(bits, bound, scale):
    weight = scale * gaussian(128, 192)
    errors = {}
    for clip in ("mse", "none"):
        quantizer = quantizers.create("affine", clip=clip)
        dense = quantizer.dequantize(quantizer.quantize(weight, bits), (128, 192), bits, torch.float32)
        errors[clip] = float((dense - weight).norm() / weight.norm())
    assert errors["mse"] < bound
    assert errors["mse"] < errors["none"]


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_grid_is_as_good_as_one_found_by_trying_every_scale(symmetric):
    quantizer = quantizers.create("affine", group_size=16, symmetric=symmetric, metadata_dtype="bfloat16")
    weight = gaussian(8, 16)
    dense = quantizer.dequantize(quantizer.quantize(weight, 3), (8, 16), 3, torch.float32)
    for row, found in zip(weight, dense, strict=True):
        tried = []
        for zero in (4,) if symmetric else range(8):
            for scale in torch.linspace(0.05, 1.5, 400):
                codes = (row / scale + zero).round().clamp(0, 7)
                tried.append(float(((codes - zero) * scale - row).square().sum()))
        assert float((found - row).square().sum()) < 1.3 * min(tried)


def test_a_weight_outside_of_the_range_of_float16_scales_becomes_zero_and_nothing_worse():
    quantizer, weight = quantizers.create("affine"), gaussian(8, 64)
    weight[2] *= 1e-9
    dense = quantizer.dequantize(quantizer.quantize(weight, 4), (8, 64), 4, torch.float32)
    assert not dense[2].any()
    assert float((dense[3] - weight[3]).norm() / weight[3].norm()) < 0.1


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("spread", [1, 30])
def test_compensation_lowers_the_output_error_on_new_tokens(bits, spread):
    totals = {"affine": 0.0, "gptq": 0.0, "affine_gptq": 0.0}
    for seed in range(4):
        weight, mixing = gaussian(48, 64, seed=seed), gaussian(16, 64, seed=seed + 10)
        x = gaussian(512, 16, seed=seed + 20) @ mixing + 0.1 * gaussian(512, 64, seed=seed + 30)
        x[:, ::16] *= spread
        for name in totals:
            quantizer = quantizers.create(name, group_size=32)
            packed = quantizer.quantize_calibrated(weight, bits, moments_of(x[:384]))
            totals[name] += output_error(quantizer, packed, weight, x[384:], bits)
    assert totals["affine_gptq"] < 0.5 * totals["affine"]
    assert totals["affine_gptq"] < (1.1 if spread == 1 else 0.9) * totals["gptq"]


def test_of_independent_equal_inputs_compensation_is_rounding_to_nearest():
    quantizer, weight = quantizers.create("affine_gptq", group_size=16), gaussian(16, 64)
    found = quantizer.quantize_calibrated(weight, 3, Moments(torch.eye(64), torch.ones(64), 10))
    nearest = quantizer.quantize(weight, 3)
    assert all(torch.equal(found[name], nearest[name]) for name in nearest)


def test_a_clipped_range_spares_the_weights_of_inputs_that_stand_out():
    weight, x = gaussian(32, 64), inputs(64, spread=30)
    quantizer, plain = quantizers.create("affine_gptq"), quantizers.create("affine")
    found, nearest = (
        weight - q.dequantize(p, (32, 64), 2, torch.float32)
        for q, p in (
            (quantizer, quantizer.quantize_calibrated(weight, 2, moments_of(x))),
            (plain, plain.quantize(weight, 2)),
        )
    )
    assert float(found[:, ::16].norm()) < 0.7 * float(nearest[:, ::16].norm())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_unbiased_scales_give_back_the_length_that_least_squares_takes(bits, symmetric):
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(bits))
    lengths = {}
    for clip in ("mse", "unbiased"):
        quantizer = quantizers.create("affine", clip=clip, symmetric=symmetric)
        dense = quantizer.dequantize(quantizer.quantize(weight, bits), (64, 128), bits, torch.float32)
        lengths[clip] = float((dense * weight).sum() / weight.square().sum())
    assert lengths["unbiased"] == pytest.approx(1.0, abs=1e-3)
    assert lengths["mse"] < 1 - 0.6 * 4.0**-bits
    zeros = torch.zeros(4, 64)
    quantizer = quantizers.create("affine", clip="unbiased", symmetric=symmetric)
    assert torch.equal(quantizer.dequantize(quantizer.quantize(zeros, bits), (4, 64), bits, torch.float32), zeros)
