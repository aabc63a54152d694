"""Codes on their grid, as forms of other tools take them, stand for the weight that the bank multiplies by."""

from __future__ import annotations

import pytest
import torch

from qratk.quantizers.base import Moments, quantizers

GROUPS = {"group_size": 32}
KINDS = [("affine", {}), ("affine", {"symmetric": True}), ("affine_gptq", {}), ("gptq", {}), ("hqq", {})]


@pytest.mark.parametrize(
    ("name", "options", "bits"),
    [("int8", {}, 8), *((name, {**GROUPS, **more}, bits) for name, more in KINDS for bits in (2, 3, 4, 8))],
    ids=str,
)
def test_grid_is_the_weight(name, options, bits):
    quantizer = quantizers.create(name, **options)
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(bits))
    inputs = torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    moments = Moments(inputs @ inputs.t(), inputs.abs().mean(0), 64)
    packed = quantizer.quantize_calibrated(weight, bits, moments)
    grid = quantizer.affine_grid(packed, (40, 64), bits)
    assert (grid.bits, grid.group_size) == (bits, 64 if name == "int8" else 32)
    assert int(grid.codes.max()) < 2**bits
    assert grid.whole == (name != "hqq")
    assert grid.symmetric == (name == "int8" or options.get("symmetric", False))
    form = quantizer.grid_form(bits)
    assert (form.group_size or 64, form.whole, form.symmetric) == (grid.group_size, grid.whole, grid.symmetric)
    assert form.scale_dtype == str(grid.scale.dtype).removeprefix("torch.")
    codes = grid.codes.float().reshape(40, -1, grid.group_size)
    dense = ((codes - grid.zero[:, :, None]) * grid.scale.float()[:, :, None]).flatten(1)
    assert torch.equal(dense, quantizer.dequantize(packed, (40, 64), bits, torch.float32))


def test_there_is_none_where_groups_span_rows_or_channels_are_scaled():
    weight = torch.randn(32, 48, generator=torch.Generator().manual_seed(0))
    hqq = quantizers.create("hqq", group_size=64)
    assert hqq.affine_grid(hqq.quantize(weight, 4), (32, 48), 4) is None
    for name, bits in (("awq", 4), ("nf4", 4), ("none", 16)):
        quantizer = quantizers.create(name, **({"group_size": 16} if name == "awq" else {}))
        assert quantizer.affine_grid(quantizer.quantize(weight, bits), (32, 48), bits) is None
        assert quantizer.grid_form(bits) is None
