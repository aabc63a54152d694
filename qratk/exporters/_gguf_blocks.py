"""Blocks of ggml: 32 weights of a row with a 16-bit scale, packed from codes and read back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

BLOCK: Final = 32
"""Weights of a block."""


@dataclass(frozen=True)
class Kind:
    """A type of ggml: its number in files, and the bytes of so many weights."""

    name: str
    number: int
    weights: int
    size: int

    def nbytes(self, count: int) -> int:
        """Bytes of a number of weights."""
        return count // self.weights * self.size


F32, F16, BF16 = Kind("F32", 0, 1, 4), Kind("F16", 1, 1, 2), Kind("BF16", 30, 1, 2)
Q4_0, Q4_1 = Kind("Q4_0", 2, BLOCK, 18), Kind("Q4_1", 3, BLOCK, 20)
Q5_0, Q8_0 = Kind("Q5_0", 6, BLOCK, 22), Kind("Q8_0", 8, BLOCK, 34)
KINDS: Final = {kind.number: kind for kind in (F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q8_0)}


def pack_q4_0(codes: np.ndarray, scale: np.ndarray) -> bytes:
    """Blocks of w = scale * (code - 8), codes (blocks, 32) from 0 to 15, scale (blocks,)."""
    return _records(scale, _nibbles(codes))


def pack_q4_1(codes: np.ndarray, scale: np.ndarray, low: np.ndarray) -> bytes:
    """Blocks of w = scale * code + low, codes (blocks, 32) from 0 to 15, scale and low (blocks,)."""
    return _records(scale, _halves(low), _nibbles(codes))


def pack_q5_0(codes: np.ndarray, scale: np.ndarray) -> bytes:
    """Blocks of w = scale * (code - 16), codes (blocks, 32) from 0 to 31, scale (blocks,)."""
    high = ((codes >> 4).astype(np.uint32) << np.arange(BLOCK, dtype=np.uint32)).sum(axis=1, dtype=np.uint32)
    return _records(scale, high.astype("<u4").view(np.uint8).reshape(-1, 4), _nibbles(codes & 15))


def pack_q8_0(codes: np.ndarray, scale: np.ndarray) -> bytes:
    """Blocks of w = scale * code, codes (blocks, 32) from -128 to 127, scale (blocks,)."""
    return _records(scale, np.ascontiguousarray(codes.astype(np.int8)).view(np.uint8))


def _records(scale: np.ndarray, *parts: np.ndarray) -> bytes:
    return np.concatenate([_halves(scale), *parts], axis=1).tobytes()


def _halves(values: np.ndarray) -> np.ndarray:
    """Bytes (blocks, 2) of numbers in float16."""
    return values.astype("<f2").view(np.uint8).reshape(-1, 2)


def _nibbles(codes: np.ndarray) -> np.ndarray:
    """Bytes (blocks, 16): the first half of a block in low bits, the second in high ones."""
    small = codes.astype(np.uint8)
    packed: np.ndarray = small[:, : BLOCK // 2] | (small[:, BLOCK // 2 :] << 4)
    return packed


def dequantised(kind: Kind, content: np.ndarray) -> np.ndarray:
    """Numbers float32 of the bytes of a tensor, by the rules of ggml."""
    if kind in (F32, F16):
        return content.view("<f4" if kind is F32 else "<f2").astype(np.float32)
    if kind is BF16:
        wide: np.ndarray = content.view("<u2").astype(np.uint32) << 16
        return wide.view(np.float32)
    blocks = content.reshape(-1, kind.size)
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
    return _READERS[kind](blocks[:, 2:], scale).reshape(-1)


def _spread(nibbles: np.ndarray) -> np.ndarray:
    return np.concatenate([nibbles & 15, nibbles >> 4], axis=1)


def _read_q4_0(rest: np.ndarray, scale: np.ndarray) -> np.ndarray:
    found: np.ndarray = scale * (_spread(rest).astype(np.float32) - 8)
    return found


def _read_q4_1(rest: np.ndarray, scale: np.ndarray) -> np.ndarray:
    low = rest[:, :2].copy().view("<f2").astype(np.float32)
    found: np.ndarray = scale * _spread(rest[:, 2:]).astype(np.float32) + low
    return found


def _read_q5_0(rest: np.ndarray, scale: np.ndarray) -> np.ndarray:
    high = (rest[:, :4].copy().view("<u4") >> np.arange(BLOCK, dtype=np.uint32)) & 1
    found: np.ndarray = scale * ((_spread(rest[:, 4:]) | (high.astype(np.uint8) << 4)).astype(np.float32) - 16)
    return found


def _read_q8_0(rest: np.ndarray, scale: np.ndarray) -> np.ndarray:
    found: np.ndarray = scale * np.ascontiguousarray(rest).view(np.int8).astype(np.float32)
    return found


_READERS: Final[Mapping[Kind, Callable[[np.ndarray, np.ndarray], np.ndarray]]] = {
    Q4_0: _read_q4_0,
    Q4_1: _read_q4_1,
    Q5_0: _read_q5_0,
    Q8_0: _read_q8_0,
}
