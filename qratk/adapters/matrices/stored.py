"""Values that adapters have as they are stored: in 16 bits, or in codes of 8 bits with a scale for each direction.

Codes of a row of A, or of a column of B, lie from -127 to 127 and have one scale, the least power of two that they
allow: a rank is what both sides share, so that directions of different sizes do not spoil each other. Of a scale its
exponent is kept, a byte (as in the microscaling formats, Rouhani et al. 2023, arXiv:2310.10537). Code times scale is
exact in bfloat16, so that plain PEFT files hold the very values, and coding them again gives the same codes.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from qratk.adapters.options import StoredType

_BITS, _MOST = 7, 127
_ALONG: Final = {"lora_A.weight": -1, "lora_B.weight": -2}  # the dimension that is not the rank


def stored_values(name: str, value: Tensor, kind: StoredType) -> Tensor:
    """The parameter's values as they are stored, in 16 bits; stacks of several candidates' (K, ...) are coded each.

    Directions with a number that is not finite come back as NaN.
    """
    dim = _along(name, kind)
    if dim is None:
        return value.to(_held(kind))
    codes, exponents = _coded(value, dim)
    found = torch.ldexp(codes.float(), exponents.int())
    return torch.where(value.isfinite().all(dim, keepdim=True), found, torch.nan).to(torch.bfloat16)


def stored_parts(name: str, value: Tensor, kind: StoredType) -> dict[str, Tensor]:
    """The tensors that hold the parameter, by name: itself in 16 bits, or codes and, as `NAME_exponent`, scales."""
    dim = _along(name, kind)
    if dim is None:
        return {name: value.to(_held(kind))}
    codes, exponents = _coded(value, dim)
    return {name: codes, f"{name}_exponent": exponents}


def _along(name: str, kind: StoredType) -> int | None:
    return next((dim for end, dim in _ALONG.items() if name.endswith(end)), None) if kind == "int8" else None


def _held(kind: StoredType) -> torch.dtype:
    return torch.float16 if kind == "float16" else torch.bfloat16


def _coded(value: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    value = value.float()
    mantissa, exponents = torch.frexp(value.abs().amax(dim, keepdim=True))  # in [1/2, 1)
    # Within 127 in 7 bits, unless the largest one would round to 128.
    exponents = (exponents - _BITS + (mantissa > _MOST / 2**_BITS)).clamp(-128, 127)
    codes = torch.ldexp(value, -exponents).round().clamp(-_MOST, _MOST)
    return codes.to(torch.int8), exponents.to(torch.int8)
