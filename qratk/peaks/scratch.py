"""Bytes that libraries take inside their kernels, which no trace sees: fused attention on the CPU, cuBLAS on a GPU.

The kernels' own buffers follow a rule by shapes. The products of the backward pass are oneDNN's where the processor
multiplies numbers of 16 bits (AVX512 and later), and what that library takes for them depends on the processor and its
caches: there it is measured. Products elsewhere in a step take from it too, up to about 2 MB a thread: not counted.
On processors with AMX the forward pass packs keys and values beforehand; whether it does is measured, too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from qratk.peaks.allocated import allocated_peak

_KEYS = 512  # in a block
_PACKED_FROM = 64  # queries and keys
_PACKED_REUSE = 4  # times that a packed number must be used

aten: Any = torch.ops.aten
_forward: Any = aten._scaled_dot_product_flash_attention_for_cpu.default
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
    plain = _plain_scratch(query.shape[2], key.shape[2], query.shape[3], query.dtype)
    return int(torch.get_num_threads() * plain) + _packed(query, key)


def _plain_scratch(queries: int, keys: int, width: int, dtype: torch.dtype) -> int:
    """Bytes of a thread."""
    q, k = _splits(queries, keys)
    reduced = 0 if dtype == torch.float32 else 2 * q * k
    return 4 * (q * k + 2 * q + q * width) + reduced


def _packed(query: torch.Tensor, key: torch.Tensor) -> int:
    """Bytes of packed keys and values and of a block of keys that each thread turns; up to 1 % high at odd lengths."""
    heads, queries, keys = query.shape[0] * query.shape[1], query.shape[2], key.shape[2]
    if min(queries, keys) < _PACKED_FROM or not (multiplied_by_onednn(query.dtype) and packs_keys(query.dtype)):
        return 0
    q, k = _splits(queries, keys)
    threads, blocks = torch.get_num_threads(), -(-queries // q)
    if -(-heads * blocks // threads) * q < _PACKED_REUSE * heads:
        return 0
    whole = 2 * heads * (keys + keys % 2)
    return int(query.dtype.itemsize * (query.shape[3] * (whole + threads * (k + k % 2)) + threads * q * (k % 2)))


@lru_cache(maxsize=8)
def packs_keys(dtype: torch.dtype) -> bool:
    """Whether the forward kernel packs keys and values of this dtype on this processor, seen at one small case."""
    query = torch.zeros(1, 1, _PACKED_FROM, 16, dtype=dtype, device="cpu")
    plain = (
        query.nbytes
        + 4 * _PACKED_FROM
        + torch.get_num_threads() * _plain_scratch(_PACKED_FROM, _PACKED_FROM, 16, dtype)
    )
    return allocated_peak(lambda: _forward(query, query, query, 0.0, True), query.device) > plain


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


_CUBLAS_WORKSPACE = 8_519_680  # of one stream by torch's default, before compute capability 9


@lru_cache(maxsize=1)
def cublas_workspace() -> int:
    """Bytes that cuBLAS and cuBLASLt keep of torch's allocator once a stream has multiplied, on the current device.

    Measured, for it depends on the device and on `CUBLAS_WORKSPACE_CONFIG`: 64 MiB on an H200. Without a GPU, what
    torch takes on most.
    """
    if not torch.cuda.is_available():
        return _CUBLAS_WORKSPACE
    clear: Any = torch._C._cuda_clearCublasWorkspaces
    clear()
    before = torch.cuda.memory_allocated()
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.zeros(64, 64, dtype=dtype, device="cuda")
        _ = matrix @ matrix, torch.addmm(matrix[0], matrix, matrix)  # the second by cuBLASLt, for its bias
        del matrix, _
    return torch.cuda.memory_allocated() - before


SCRATCH: dict[Any, Callable[[tuple[Any, ...]], int]] = {
    _forward: _forward_scratch,
    _backward: _backward_scratch,
}
"""What each kernel takes, from its arguments: (query, key, ...), for the backward pass behind the gradient."""
