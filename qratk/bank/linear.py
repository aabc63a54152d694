"""A linear layer that holds its weight at several bit-widths, packed, and multiplies by one of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from qratk.bank.dense import DenseCache, dense_cache_mode
from qratk.core.errors import QuantizationError
from qratk.quantizers.base import Quantizer

Packed = dict[str, torch.Tensor]
VariantKey = int | tuple[int, int]
"""Bits, or (bits, rank) of a weight that was packed for adapters of one rank."""


class Variant(ABC):
    """A weight packed by a quantizer: which one, at how many bits (more than asked for after a fallback)."""

    quantizer: Quantizer
    bits: int

    @property
    @abstractmethod
    def packed(self) -> Packed:
        """The packed tensors."""

    @property
    @abstractmethod
    def held(self) -> bool:
        """Whether the packed tensors are kept, and so survive the release of the reference."""

    @abstractmethod
    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> Variant:
        """The same with every tensor moved."""

    def dequantize(self, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """Dense weight (d_out, d_in)."""
        return self.quantizer.dequantize(self.packed, shape, self.bits, dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed tensors."""
        return sum(tensor.nbytes for tensor in self.packed.values())


@final
@dataclass(frozen=True)
class PackedVariant(Variant):
    """A weight in packed form."""

    quantizer: Quantizer
    bits: int
    tensors: Packed

    @property
    def packed(self) -> Packed:
        """The packed tensors."""
        return self.tensors

    @property
    def held(self) -> bool:
        """Yes."""
        return True

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> PackedVariant:
        """The same with every tensor moved."""
        return PackedVariant(self.quantizer, self.bits, {name: move(tensor) for name, tensor in self.tensors.items()})


@final
@dataclass(frozen=True)
class ReferenceVariant(Variant):
    """A weight packed anew whenever it is used, from a reference that is there anyway: nothing is held besides."""

    quantizer: Quantizer
    bits: int
    reference: torch.Tensor

    @property
    def packed(self) -> Packed:
        """The packed tensors; they share memory with the reference where its type is theirs."""
        with torch.no_grad():
            return self.quantizer.quantize(self.reference.contiguous(), self.bits)

    @property
    def held(self) -> bool:
        """No."""
        return False

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> ReferenceVariant:
        """The same over the moved reference."""
        return ReferenceVariant(self.quantizer, self.bits, move(self.reference))


class DequantizedMatmul(torch.autograd.Function):
    """x W^T with W made anew in forward and again in backward, so that no dense weight is kept between them.

    The gradient is that of x alone: the weight is frozen. `after` adds the bias to the finished product, as the hqq
    library does, instead of fusing it into the multiplication: the two differ in the last bit.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, dense: Callable[[], torch.Tensor], bias: torch.Tensor | None, after: bool
    ) -> torch.Tensor:
        """Product (..., d_out) of x (..., d_in) with the dense weight that `dense()` returns, plus the bias."""
        ctx.dense = dense
        if not after or bias is None:
            return nn.functional.linear(x, dense(), bias)
        return torch.matmul(x, dense().t()).add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        """Gradient of x, (..., d_in)."""
        return (torch.matmul(grad, ctx.dense()) if ctx.needs_input_grad[0] else None), None, None, None


def dequantized_matmul(
    x: torch.Tensor, dense: Callable[[], torch.Tensor], bias: torch.Tensor | None, *, after: bool = False
) -> torch.Tensor:
    """x W^T plus the bias, (..., d_out), by `DequantizedMatmul`."""
    function: Any = DequantizedMatmul
    out: torch.Tensor = function.apply(x, dense, bias, after)
    return out


def _first(value: torch.Tensor, then: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Returns `value` once and lets go of it, and afterwards what `then` returns."""
    values = [value]
    return lambda: values.pop() if values else then()


class FrozenWeight(torch.Tensor):
    """A dense copy of a packed weight, for reading. Assigning to `data` raises.

    PEFT merges adapters, and several initialisations (PiSSA, OLoRA, LoftQ) shift the base, by
    `base_layer.weight.data = ...`. On a copy that would be lost in silence, so it is an error here.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> torch.Tensor:
        """A plain copy of the values."""
        return self.as_subclass(torch.Tensor).detach().clone()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        raise QuantizationError(
            "the weight of a bank layer is packed and cannot be assigned: an adapter merged into it would be lost. "
            "Export the model instead: `qratk.exporters` writes adapters, packed weights and dense merged ones"
        )


class BankLinear(nn.Linear):
    """A frozen `nn.Linear` whose weight is one of several packed variants, chosen by `active`.

    PEFT wraps it as any `nn.Linear`. The packed tensors are neither parameters nor buffers: they follow `.to(device)`,
    but no change of dtype (which would break their format), no state dict and no broadcast between processes.

    Args:
        weight: the reference (d_out, d_in), in the checkpoint's own dtype; may be on the meta device.
        bias: (d_out,) or None, kept in the checkpoint's own dtype.
        dense_cache: keep dequantised weights: "off", "on" or "auto" (while memory allows), or a cache that several
            projections share. Faster, more memory, the same results.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, *, dense_cache: bool | str | DenseCache = "off"
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self._dense_cache = DenseCache()
        self._token = object()  # names this projection in the cache
        self.set_dense_cache(dense_cache)
        self._reference: torch.Tensor | None = weight.detach()
        self._bias = None if bias is None else bias.detach().contiguous()
        self._variants: dict[int, Variant] = {}
        self._ranked: dict[tuple[int, int], Variant] = {}
        self._active = 16
        self._active_rank: int | None = None
        self.hide_weight = False

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return (self.out_features, self.in_features)

    @property
    def device(self) -> torch.device:
        """Where the weight lies."""
        return self._any_tensor().device

    @property
    def reference(self) -> torch.Tensor:
        """The full-precision weight (d_out, d_in), maybe a transposed view.

        Raises `QuantizationError` once it was released.
        """
        if self._reference is None:
            raise QuantizationError("the full-precision weight was released; load the model again to use it")
        return self._reference

    @property
    def has_reference(self) -> bool:
        """Whether the full-precision weight is still held."""
        return self._reference is not None

    @property
    def variants(self) -> Mapping[int, Variant]:
        """The packed variants by the bit-width they answer to."""
        return self._variants

    @property
    def active(self) -> int:
        """The bit-width in use."""
        return self._active

    @property
    def active_rank(self) -> int | None:
        """The rank that the weight in use may have been packed for."""
        return self._active_rank

    def activate(self, bits: int, rank: int | None = None) -> None:
        """Multiply by the variant of this bit-width from now on, or by that packed for this rank where there is one.

        Raises `QuantizationError` when it is not there.
        """
        self.require(bits)
        self._active, self._active_rank = bits, rank

    def key(self, bits: int, rank: int | None = None) -> VariantKey:
        """What names the variant in use at these bits and rank: the bits alone unless one was packed for the rank."""
        return (bits, rank) if rank is not None and (bits, rank) in self._ranked else bits

    def find(self, key: VariantKey) -> Variant | None:
        """The variant of a key, or None."""
        return self._ranked.get(key) if isinstance(key, tuple) else self._variants.get(key)

    def holds(self, bits: int) -> bool:
        """Whether a bit-width is there in packed form, and so survives the release of the reference."""
        return bits in self._variants and self._variants[bits].held

    def require(self, bits: int, rank: int | None = None) -> Variant:
        """The variant of a bit-width, packed for this rank if there is such a one.

        Raises `QuantizationError`, saying what to do, when the bits are not in the bank.
        """
        if bits not in self._variants:
            cure = f"`backbone.build_bank([{bits}])`" if self.has_reference else "load the model again, then build it"
            raise QuantizationError(
                f"the bank holds {sorted(self._variants)} bits for a {self.out_features} x {self.in_features} "
                f"projection, not {bits}: {cure}"
            )
        return self.find(self.key(bits, rank)) or self._variants[bits]

    def set_dense_cache(self, cache: bool | str | DenseCache) -> None:
        """Keep dequantised weights ("off", "on", "auto"), in a cache of its own or in one that is shared."""
        self._dense_cache.drop(self._token)
        self._dense_cache = cache if isinstance(cache, DenseCache) else DenseCache(dense_cache_mode(cache))

    def add_variant(self, bits: int, variant: Variant, *, rank: int | None = None) -> None:
        """Put a packed weight into the bank, for any rank or for adapters of one rank alone."""
        if rank is None:
            self._variants[bits] = variant
        else:
            self._ranked[bits, rank] = variant
        self._dense_cache.drop(self._token, bits if rank is None else (bits, rank))

    def keep_active(self) -> None:
        """Hold the variant in use, for any rank from now on, and no other."""
        kept = self.require(self._active, self._active_rank)
        self._variants, self._ranked, self._active_rank = {self._active: kept}, {}, None
        self._dense_cache.drop(self._token)

    def install(self, bits: int, variant: Variant, bias: torch.Tensor | None) -> None:
        """Hold this packed weight and bias and nothing else."""
        self._reference, self._bias = None, bias
        self._variants, self._active = {bits: variant}, bits
        self._ranked, self._active_rank = {}, None
        self._dense_cache.drop(self._token)

    def drop_variant(self, bits: int) -> None:
        """Take a packed weight out of the bank, those for single ranks too; nothing happens when it is not there."""
        self._variants.pop(bits, None)
        self._dense_cache.drop(self._token, bits)
        for key in [key for key in self._ranked if key[0] == bits]:
            del self._ranked[key]
            self._dense_cache.drop(self._token, key)

    def release_reference(self) -> None:
        """Let go of the full-precision weight; the packed variants stay."""
        self._reference = None

    def dequantized(self, bits: int, dtype: torch.dtype = torch.float32, *, rank: int | None = None) -> torch.Tensor:
        """Dense weight (d_out, d_in) that a variant stands for, as a new tensor."""
        with torch.no_grad():
            return self.require(bits, rank).dequantize(self.shape, dtype)

    def dense_weight(self, bits: int, dtype: torch.dtype) -> torch.Tensor:
        """Dense weight (d_out, d_in) of a variant to multiply by, from the dense cache or made anew.

        Not to be written to: it may be kept, or be the stored weight itself. What is made is kept only as the cache's
        mode and memory allow; with "off" nothing is.
        """
        return self._dense_weight(self.require(bits), bits, dtype)

    def keyed_weight(self, key: VariantKey, dtype: torch.dtype) -> torch.Tensor:
        """As `dense_weight`, of the variant that a key names."""
        bits, rank = key if isinstance(key, tuple) else (key, None)
        return self._dense_weight(self.require(bits, rank), self.key(bits, rank), dtype)

    def weight_in_use(self, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
        """What gives the dense weight (d_out, d_in) that is active now, as `dense_weight`, also after a switch."""
        variant, key = self.require(self._active, self._active_rank), self.key(self._active, self._active_rank)
        return partial(self._dense_weight, variant, key, dtype)

    def _dense_weight(self, variant: Variant, key: VariantKey, dtype: torch.dtype) -> torch.Tensor:
        shape = self.shape

        def owned(dense: torch.Tensor) -> bool:
            memory = dense.untyped_storage().data_ptr()
            return all(memory != t.untyped_storage().data_ptr() for t in variant.packed.values())

        def make() -> torch.Tensor:
            with torch.no_grad():
                return variant.dequantize(shape, dtype)

        if self.find(key) is not variant:  # taken out of the bank since it was used
            return make()
        return self._dense_cache.get((self._token, key, dtype), make, owned=owned)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """Dense copy of the active weight, read-only, made anew at each access; prefer `dequantized`."""
        if self.hide_weight or self._active not in self._variants:
            return torch.empty(self.shape, device="meta")
        dense = self.dequantized(self._active, self._cache_dtype, rank=self._active_rank)
        return torch.Tensor._make_subclass(FrozenWeight, dense)

    @property
    def bias(self) -> torch.Tensor | None:  # type: ignore[override]
        """The bias (d_out,) as stored, or None."""
        return self._bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Product (..., d_out) of x (..., d_in) with the active weight, plus the bias, in the dtype of x."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        variant, key = self.require(self._active, self._active_rank), self.key(self._active, self._active_rank)
        bias = None if self._bias is None else self._bias.to(x.dtype)
        after = variant.quantizer.adds_bias_afterwards
        # Bound to the variant, not to the layer: a switch between forward and backward must not change the gradient.
        dense = partial(self._dense_weight, variant, key, x.dtype)
        if self._dense_cache.mode == "off":
            return dequantized_matmul(x, dense, bias, after=after)
        weight = dense()
        if not self._dense_cache.holds((self._token, key, x.dtype)):
            return dequantized_matmul(x, _first(weight, dense), bias, after=after)
        # Autograd keeps what the cache keeps anyway.
        return (
            nn.functional.linear(x, weight).add(bias)
            if after and bias is not None
            else nn.functional.linear(x, weight, bias)
        )

    @property
    def _cache_dtype(self) -> torch.dtype:
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16

    def _any_tensor(self) -> torch.Tensor:
        if self._reference is not None:
            return self._reference
        return next(iter(next(iter(self._variants.values())).packed.values()))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> BankLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # The 16-bit variant may share memory with the reference: move it once. The old one is held, for its address.
        moved: dict[tuple[int, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}

        def move(tensor: torch.Tensor) -> torch.Tensor:
            # Tested on an empty tensor, so that a mere change of dtype costs no dense copy.
            device = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device)).device
            if device == tensor.device:
                return tensor
            key = (tensor.data_ptr() or id(tensor), tensor.dtype)
            if key not in moved:
                moved[key] = (tensor, tensor.to(device))
            return moved[key][1]

        if self._reference is not None:
            self._reference = move(self._reference)
        if self._bias is not None:
            self._bias = move(self._bias)
        self._variants = {bits: variant.moved(move) for bits, variant in self._variants.items()}
        self._ranked = {key: variant.moved(move) for key, variant in self._ranked.items()}
        if moved:  # every Trainer puts a model where it lies already
            self._dense_cache.drop(self._token)
        return self

    def extra_repr(self) -> str:
        """Shape and bit-widths."""
        held = sorted(self._variants)
        return (
            f"{self.in_features}, {self.out_features}, bits={held}, active={self._active}, bias={self.bias is not None}"
        )
