"""4 bits by the NormalFloat code of QLoRA, in bitsandbytes' storage layout."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

from qratk.core.errors import ConfigurationError, QuantizationError
from qratk.quantizers._checks import require_finite
from qratk.quantizers.base import PackedBytes, PackedLayer, Quantizer, quantizers

if TYPE_CHECKING:
    import torch
    from torch import nn

_NESTED_BLOCK = 256  # fixed by bitsandbytes: its kernels take no other
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@quantizers.register("nf4")
@dataclass(frozen=True)
class NF4Quantizer(Quantizer):
    """NormalFloat-4 with one absolute maximum a block, itself quantised to 8 bits by default (double quantisation).

    The code tables (16 and 256 float32 values, `shared_bytes`) are the same for all layers: they are held once, not
    with each weight, and counted once.

    Args:
        block_size: weights that share an absolute maximum.
        double_quantization: whether the maxima are quantised too.
    """

    block_size: int = 64
    double_quantization: bool = True

    def __post_init__(self) -> None:
        if self.block_size not in _BLOCKS:
            raise ConfigurationError(f"block_size must be one of {_BLOCKS}, got {self.block_size}")

    @property
    def supported_bits(self) -> tuple[int, ...]:
        """4."""
        return (4,)

    @property
    def shared_bytes(self) -> int:
        """Bytes of the code tables, once in all."""
        return 4 * 16 + (4 * 256 if self.double_quantization else 0)

    def check(self, shape: tuple[int, int], bits: int) -> None:
        """Raise `QuantizationError` for anything but 4 bits; every shape is taken."""
        if bits != 4:
            raise QuantizationError(f"'nf4' does 4 bits, got {bits}; take 'hqq' for lower ones, 'int8' for 8")

    def quantize(self, weight: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
        """`codes` uint8 (ceil(n / 2), 1), `absmax` (blocks,) and, if doubly quantised, `nested_absmax` and `offset`."""
        from bitsandbytes.functional import quantize_4bit

        self.check((weight.shape[0], weight.shape[1]), bits)
        require_finite("nf4", weight)
        codes, state = quantize_4bit(
            weight.detach().float().contiguous(),
            blocksize=self.block_size,
            compress_statistics=self.double_quantization,
            quant_type="nf4",
        )
        return self.packed_of(codes, state)

    def dequantize(
        self, packed: dict[str, torch.Tensor], shape: tuple[int, int], bits: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """Weight (d_out, d_in), by bitsandbytes' own function.

        On CPUs with AVX512 that function takes every row to begin with a block of its own. Where blocks go on from one
        row to the next it is asked for one long row instead: the same numbers, in the same order.
        """
        from bitsandbytes.functional import dequantize_4bit

        whole_blocks = shape[1] % self.block_size == 0
        # An odd row is dequantised by another kernel, which is right as it is.
        asked = shape if whole_blocks or shape[1] % 2 else (1, shape[0] * shape[1])
        return dequantize_4bit(packed[self.CODES], self.quant_state(packed, asked, dtype)).reshape(shape)

    def packed_of(self, codes: torch.Tensor, state: Any) -> dict[str, torch.Tensor]:
        """The packed tensors, shared and not copied, of codes and their `QuantState`."""
        packed = {self.CODES: codes, "absmax": state.absmax}
        if self.double_quantization:
            packed |= {"nested_absmax": state.state2.absmax, "offset": state.offset}
        return packed

    def quant_state(self, packed: dict[str, torch.Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Any:
        """bitsandbytes' `QuantState` over the packed tensors (shared, not copied) and the shared code tables."""
        import torch
        from bitsandbytes.functional import QuantState

        codes, make = packed[self.CODES], cast(Any, QuantState)
        state2 = None
        if self.double_quantization:
            state2 = make(
                absmax=packed["nested_absmax"],
                code=_dynamic_table(codes.device),
                blocksize=_NESTED_BLOCK,
                dtype=torch.float32,
            )
        return make(
            absmax=packed["absmax"],
            shape=torch.Size(shape),
            dtype=dtype,
            blocksize=self.block_size,
            code=_nf4_table(codes.device),
            quant_type="nf4",
            offset=packed.get("offset"),
            state2=state2,
        )

    def native_layer(self, layer: PackedLayer) -> nn.Module:
        """A `WeightOnlyLinear4bit`."""
        from qratk.quantizers._bitsandbytes import linear_4bit

        def dense(codes: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
            return self.dequantize(self.packed_of(codes, state), layer.shape, 4, dtype)

        bias, packed = layer.parameters()
        state = self.quant_state(packed, layer.shape, layer.dtype)
        return linear_4bit(packed[self.CODES], state, bias, layer, dense=dense)

    def packed_bytes(self, shape: tuple[int, int], bits: int) -> PackedBytes:
        """Half a byte a weight; one byte (or four) a block; four a nested block and four for the offset."""
        self.check(shape, bits)
        n = shape[0] * shape[1]
        blocks = _ceil(n, self.block_size)
        statistics = blocks + 4 * _ceil(blocks, _NESTED_BLOCK) + 4 if self.double_quantization else 4 * blocks
        return PackedBytes(_ceil(n, 2), statistics)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


@lru_cache(maxsize=32)
def _nf4_table(device: torch.device) -> torch.Tensor:
    import bitsandbytes.functional as functional

    table: torch.Tensor = cast(Any, functional).get_4bit_type("nf4", device=device)
    return table


@lru_cache(maxsize=32)
def _dynamic_table(device: torch.device) -> torch.Tensor:
    import bitsandbytes.functional as functional

    table: torch.Tensor = cast(Any, functional).create_dynamic_map().to(device)
    return table
