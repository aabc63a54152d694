"""What the forms of packed weights have in common: one type for the whole model, and tensors in its order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qratk.core.errors import ConfigurationError, QuantizationError
from qratk.core.work import counted
from qratk.exporters.base import EXACT, grid_of, has_adapter
from qratk.exporters.dense import ROUNDED

if TYPE_CHECKING:
    import torch
    from torch import nn

    from qratk.backbone.backbone import Backbone
    from qratk.bank.linear import BankLinear
    from qratk.exporters._shards import Lazy

ADAPTER: Final = "adapter"
"""Folder of the adapter beside the weights."""
CURE: Final = "search with quantisers that servers read (model.quantizers: portable), or export 'dense'"
"""What to do where codes have no whole zero points in groups of a row."""

Packing = Callable[[str, "BankLinear"], "Iterable[tuple[str, torch.Tensor]] | None"]
"""Tensors of a packed projection, by their names in a file; None for one that is written in 16 bits."""


def scale_dtype(backbone: Backbone, packed: Iterable[str]) -> torch.dtype:
    """The type of all scales of these projections, which is that of the whole model.

    Raises `QuantizationError` where there are two.
    """
    found: dict[torch.dtype, str] = {}
    for name in packed:
        grid = grid_of(backbone.banks[name])
        if grid is not None:
            found.setdefault(grid.scale.dtype, name)
    if len(found) > 1:
        kinds = " and ".join(f"{str(dtype).removeprefix('torch.')} ({name})" for dtype, name in found.items())
        raise QuantizationError(
            f"scales are of two types, {kinds}, and a served model has one; give all quantisers the same metadata_dtype"
        )
    return next(iter(found))


def written_tensors(backbone: Backbone, dtype: torch.dtype, packing: Packing) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and values of all tensors of a folder, one projection after another; what is not packed has a type."""
    from qratk.exporters._skeleton import is_turned

    turned = is_turned(backbone)
    for name, tensor in backbone.fixed_tensors().items():
        yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor
    for name, bank in counted("writing weights", backbone.banks.items(), len(backbone.banks)):
        packed = packing(name, bank)
        if packed is None:
            dense = bank.dequantized(bank.active, rank=bank.active_rank)
            yield f"{name}.weight", (dense.t() if turned(name) else dense).to(dtype).contiguous()
        else:
            yield from packed
        if bank.bias is not None:
            yield f"{name}.bias", bank.bias.to(dtype)


def write_folder(
    backbone: Backbone, directory: Path, dtype: torch.dtype, packing: Packing, settings: Mapping[str, Any], *, pad: bool
) -> None:
    """Write weights projection by projection, `settings` as `quantization_config`, and the adapter beside for PEFT."""
    import torch

    from qratk.exporters._folder import write_description
    from qratk.exporters._shards import write_shards
    from qratk.exporters.peft import write_adapter

    with torch.no_grad():
        write_shards(written_tensors(backbone, dtype, packing), directory)
    write_description(backbone, directory, dtype=dtype, more={"quantization_config": settings})
    if has_adapter(backbone):
        write_adapter(backbone, directory / ADAPTER, pad=pad, base=None)


def read_folder(backbone: Backbone, directory: Path, tensors: Lazy, packed: Iterable[str]) -> nn.Module:
    """A model of what `write_folder` wrote, unpacked: weights of `packed` projections are (d_out, d_in)."""
    from transformers import AutoConfig

    from qratk.adapters.matrices.folder import read_pairs
    from qratk.exporters._reading import as_in_files, reading_model

    adapter = directory / ADAPTER
    pairs = read_pairs(adapter) if adapter.exists() else {}
    config = AutoConfig.from_pretrained(directory)
    del config.quantization_config
    return reading_model(backbone, config, as_in_files(backbone, tensors, packed), pairs=pairs)


def require_bits(dense_bits: int) -> None:
    """Raise `ConfigurationError` for what is no bit-width from which on layers are written in 16 bits."""
    if dense_bits < 0:
        raise ConfigurationError(f"dense_bits must be a bit-width, as in 8, or 0; got {dense_bits}")


def written_dense(bits: int, dense_bits: int) -> bool:
    """Whether layers of so many bits are written in 16: those that have them, and from `dense_bits` on, unless 0."""
    return bits >= 16 or 0 < dense_bits <= bits


def rounding(backbone: Backbone, dtype: torch.dtype, dense: Mapping[str, bool]) -> float:
    """Tolerance of a folder whose packed weights are exact, and whose other ones (`dense`, by name) have a type."""
    weights = (bank.dequantized(bank.active, rank=bank.active_rank) for n, bank in backbone.banks.items() if dense[n])
    biases = (bank.bias for bank in backbone.banks.values() if bank.bias is not None)
    for tensor in (*backbone.fixed_tensors().values(), *biases):
        if not holds(dtype, tensor):
            return rounded_to(dtype)
    return EXACT if all(holds(dtype, weight) for weight in weights) else rounded_to(dtype)


def rounded_to(dtype: torch.dtype) -> float:
    """Tolerance of weights that are rounded to a type."""
    return next(share for name, share in ROUNDED.items() if str(dtype) == f"torch.{name}")


def holds(dtype: torch.dtype, tensor: torch.Tensor) -> bool:
    """Whether a type holds the very numbers of a tensor; of whole numbers always."""
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return True
    return bool((tensor.to(dtype).to(tensor.dtype) == tensor).all())


def narrowest(backbone: Backbone) -> torch.dtype:
    """The 16-bit type that holds the numbers of embeddings, head and norms; float32 where neither does.

    A checkpoint of 16 bits computes in float32 on most CPUs, and its numbers are still those of 16 bits.
    """
    import torch

    tensors = [tensor for tensor in backbone.fixed_tensors().values() if tensor.is_floating_point()]
    for dtype in (torch.bfloat16, torch.float16):
        if all(holds(dtype, tensor) for tensor in tensors):
            return dtype
    return torch.float32


def require_named_files(backbone: Backbone) -> None:
    """Raise `QuantizationError` for a family whose files are not named as its projections."""
    from qratk.exporters._folder import is_converted

    if is_converted(backbone):
        raise QuantizationError(
            f"files of {type(backbone.base).__name__} are not named as its projections; export 'dense' or 'packed'"
        )


def refuse_dora(backbone: Backbone, client: str) -> None:
    """Raise `ConfigurationError` where there is a DoRA adapter, which a client does not take."""
    if has_adapter(backbone) and backbone.adapters.peft_config().use_dora:
        raise ConfigurationError(f"{client} takes no DoRA beside packed weights; export 'dense', which merges it")
