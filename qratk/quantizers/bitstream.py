"""Whole numbers of few bits as a stream: element i of a row begins at bit i * bits, least significant bit first."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_WORD = 4  # bytes


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Stream (..., n * bits / 8) uint8 of whole numbers (..., n) below 2^bits; n is a multiple of 8, bits 1 to 8."""
    import torch

    if bits == 8:
        return codes.to(torch.uint8)
    eights = codes.to(torch.int64).reshape(*codes.shape[:-1], -1, 8)
    shifts = bits * torch.arange(8, device=codes.device)
    words = (eights << shifts).sum(dim=-1, keepdim=True)  # 8 * bits bits each, at most 56
    return (words >> (8 * torch.arange(bits, device=codes.device)) & 0xFF).to(torch.uint8).flatten(-2)


def unpack_bits(stream: torch.Tensor, bits: int) -> torch.Tensor:
    """Whole numbers (..., n) uint8 of a stream (..., n * bits / 8) of uint8."""
    import torch

    if bits == 8:
        return stream
    if bits in (1, 2, 4):  # a byte holds whole numbers
        shifts = torch.arange(0, 8, bits, device=stream.device, dtype=torch.uint8)
        few: torch.Tensor = (stream.unsqueeze(-1) >> shifts) & (2**bits - 1)
        return few.flatten(-2)
    kind = torch.int32 if bits == 3 else torch.int64
    parts = stream.reshape(*stream.shape[:-1], -1, bits)
    words = parts[..., 0].to(kind)
    for index in range(1, bits):
        words |= parts[..., index].to(kind) << 8 * index
    shifts = bits * torch.arange(8, device=stream.device, dtype=kind)
    numbers: torch.Tensor = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return numbers.to(torch.uint8).flatten(-2)


def words_of(count: int, bits: int) -> int:
    """Words of 32 bits that so many numbers take."""
    return -(-count * bits // 32)


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Stream of whole numbers (..., n) in words of 32 bits, (..., ceil(n * bits / 32)) int32, zeros at its end."""
    import torch

    count = codes.shape[-1]
    padded = torch.nn.functional.pad(codes.to(torch.uint8), (0, -count % 32))
    words = _viewed(pack_bits(padded, bits), torch.int32)
    return words[..., : words_of(count, bits)].contiguous()


def unpack_words(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first `count` whole numbers (..., count) uint8 of a stream in words of 32 bits."""
    import torch

    stream = _viewed(words, torch.uint8)
    short = -(-count // 32) * _WORD * bits - stream.shape[-1]
    if short:
        stream = torch.nn.functional.pad(stream, (0, short))
    return unpack_bits(stream, bits)[..., :count]


def _viewed(numbers: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    # By way of one long row: the stride of a dimension of one need not suit the other type.
    return numbers.reshape(-1).contiguous().view(kind).reshape(*numbers.shape[:-1], -1)
