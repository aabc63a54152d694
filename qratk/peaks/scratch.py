"""Bytes that kernels of fused attention on the CPU take and give back inside themselves, which no trace sees.

The kernels' own buffers follow a rule by shapes. The products of the backward pass are oneDNN's where the processor
multiplies numbers of 16 bits (AVX512 and later), and what that library takes for them depends on the processor and its
caches: there it is measured. Products elsewhere in a step take from it too, up to about 2 MB a thread: not counted.
Nor are the packed keys and values, about as large as these, that the forward pass makes of at least four heads whose
width is a multiple of 64 on processors with AMX.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from qratk.peaks.allocated import allocated_peak

_KEYS = 512  # in a block

aten: Any = torch.ops.aten
_backward: Any = aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def multiplied_by_onednn(dtype: torch.dtype) -> bool:
    """Whether torch leaves products of this dtype to oneDNN on this processor."""
    library: Any = torch.backends.mkldnn
    if not (library.is_available() and library.enabled):
        return False
    able: Any = torch.ops.mkldnn
    probes = {torch.bfloat16: able._is_mkldnn_bf16_supported, torch.float16: able._is_mkldnn_fp16_supported}
    return dtype in probes and bool(probes[dtype]())


def _splits(queries: int, keys: int) -> tuple[int, int]:
    split = 256 if queries >= 768 else 64 if queries >= 192 else 32
    return min(split, queries), min(_KEYS, keys)


def _forward_scratch(args: tuple[Any, ...]) -> int:
    query, key = args[0], args[1]
    q, k = _splits(query.shape[2], key.shape[2])
    numbers = q * k + 2 * q + q * query.shape[3]
    reduced = 0 if query.dtype == torch.float32 else 2 * q * (k + k % 2)
    return int(torch.get_num_threads() * (4 * numbers + reduced))


def _backward_scratch(args: tuple[Any, ...]) -> int:
    grad, query, key = args[0], args[1], args[2]
    # The kernel goes through (batch, length, heads, width).
    copied = 0 if grad.transpose(1, 2).is_contiguous() else int(grad.nbytes)
    taken = _backward_buffers(query.shape[2], key.shape[2], query.dtype) + copied
    if multiplied_by_onednn(query.dtype):
        threads = torch.get_num_threads()
        lengths = shortest_alike(query.shape[2], key.shape[2])
        busy = min(threads, query.shape[0] * query.shape[1])
        taken += busy * product_scratch(*lengths, query.shape[3], query.dtype, threads)
    return taken


def _backward_buffers(queries: int, keys: int, dtype: torch.dtype) -> int:
    q, k = _splits(queries, keys)
    reduced = 0 if dtype == torch.float32 else 2 * 2 * q * k
    return torch.get_num_threads() * (4 * (2 * q * k + q) + reduced)


def shortest_alike(queries: int, keys: int) -> tuple[int, int]:
    """The smallest numbers of queries and keys that are cut into blocks of the same sizes."""
    q, k = _splits(queries, keys)
    whole = {256: 768, 64: 192}.get(q, q)  # so many queries that they are cut so
    return min(queries, whole + queries % q), min(keys, k + keys % k)


@lru_cache(maxsize=64)
def product_scratch(queries: int, keys: int, width: int, dtype: torch.dtype, threads: int) -> int:
    """Most bytes that one thread's products take while a sequence of one head goes through the backward kernel.

    Measured on zeros, beyond the kernel's results and its own buffers. `threads` is that of torch: the library takes
    more when it may use more.
    """
    query, key = (torch.zeros(1, 1, length, width, dtype=dtype, device="cpu") for length in (queries, keys))
    sums = torch.zeros(1, queries, 1, device="cpu").transpose(1, 2)
    grad, known = query, 2 * key.nbytes + query.nbytes + _backward_buffers(queries, keys, dtype)

    def action() -> None:
        _backward(grad, query, key, key, query, sums, 0.0, False)

    action()  # what a library keeps from its first call on is not scratch
    return max(0, allocated_peak(action, query.device) - known)


SCRATCH: dict[Any, Callable[[tuple[Any, ...]], int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu.default: _forward_scratch,
    _backward: _backward_scratch,
}
"""What each kernel takes, from its arguments: (query, key, ...), for the backward pass behind the gradient."""
