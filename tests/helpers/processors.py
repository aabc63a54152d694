"""bitsandbytes as it behaves on processors with and without AVX512-BF16, whatever processor runs the tests."""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes.functional as functional
import pytest
import torch
from bitsandbytes.backends.cpu import ops
from bitsandbytes.nn import modules

KINDS = ("plain", "avx512_bf16")
HAS_IT = bool(functional.has_avx512bf16())
_VECTOR = 16  # float32 values in a register of 512 bits


def imitate(kind: str, patch: pytest.MonkeyPatch) -> None:
    """Let bitsandbytes' layers and CPU kernels do what they do on a kind of processor, until `patch` is undone.

    The instructions themselves are not needed: where they are missing, a slow stand-in reads the same repacked weights
    with the same scales in bfloat16, multiplies by the weight rounded to bfloat16 and rounds the product.
    """
    patch.setattr(modules, "has_avx512bf16", lambda: kind == "avx512_bf16")
    if kind == "avx512_bf16" and not HAS_IT:
        patch.setattr(functional, "gemv_4bit", gemv_4bit)
        patch.setattr(ops, "_has_avx512", True)
        patch.setattr(ops, "lib", RowByRow(ops.lib))


def gemv_4bit(A: torch.Tensor, B: torch.Tensor, out: torch.Tensor | None = None, state: Any = None) -> torch.Tensor:
    """A times the transposed weight that `Linear4bit` repacked, (..., N), in bfloat16 and then in A's dtype."""
    plain = copy.copy(state)
    plain.original_nested = False  # the scales are unpacked already
    codes, plain = functional._convert_weight_packed_for_cpu_inverse(B.detach().clone(), plain)
    rows, columns = state.shape
    scales = state.absmax.t().float().repeat_interleave(state.blocksize, dim=1)  # (N, K)
    nibbles = torch.stack((codes.reshape(-1) >> 4, codes.reshape(-1) & 0xF), dim=1).reshape(rows, columns)
    weight = (state.code[nibbles.int()] * scales).to(torch.bfloat16)
    product = torch.nn.functional.linear(A.to(torch.bfloat16).float(), weight.float())
    return product.to(torch.bfloat16).to(A.dtype)


class RowByRow:
    """bitsandbytes' compiled library, with NF4 dequantised as AVX512 does: every row begins with a block of its own.

    That is wrong where the rows hold no whole number of blocks, and it is what the vectorised loop does whenever they
    hold a whole number of vectors.
    """

    def __init__(self, library: Any) -> None:
        self._library = library

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._library, name)
        size = {"fp32": 4, "bf16": 2, "fp16": 2}.get(name.removeprefix("cdequantize_blockwise_cpu_nf4_"))
        if size is None:
            return function

        def dequantize(codes: Any, absmax: Any, out: Any, block: Any, rows: Any, columns: Any) -> None:
            m, n, b = rows.value, columns.value, block.value
            if n % _VECTOR:
                function(codes, absmax, out, block, rows, columns)
                return
            for row in range(m):
                starts = (codes.value + row * n // 2, absmax.value + 4 * row * (n // b), out.value + size * row * n)
                function(*map(type(codes), starts), block, type(rows)(1), columns)

        return dequantize
