"""bitsandbytes' form as transformers reads it: nf4, or int8, beside layers in 16 bits."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, cast, get_args

from qratk.core.errors import ConfigurationError, QuantizationError
from qratk.exporters._grids import (
    ADAPTER,
    narrowest,
    read_folder,
    require_bits,
    require_named_files,
    rounding,
    write_folder,
    written_dense,
)
from qratk.exporters.base import Exporter, Holding, Serving, exporters, has_adapter
from qratk.exporters.dense import Dense

if TYPE_CHECKING:
    import torch
    from torch import nn

    from qratk.backbone.backbone import Backbone
    from qratk.bank.linear import BankLinear
    from qratk.exporters.base import Wanted

STATE: Final = "quant_state.bitsandbytes__nf4"
_CURE: Final = (
    "search with search.bits: [4, 16] and model.quantizers: {4: nf4}, or export 'packed', which holds every quantiser"
)
_VECTORISED_OUTPUTS: Final = 32  # of a layer that bitsandbytes multiplies in bfloat16


@exporters.register("bitsandbytes")
class BitsandbytesExporter(Exporter):
    """A Hugging Face folder of nf4 codes, or of int8 codes, that transformers loads as layers of bitsandbytes.

    transformers makes all packed layers of one kind, so that 4 bits and 8 cannot lie together. Layers in 16 bits, and
    whatever else is no packed projection, are named in `llm_int8_skip_modules`.

    transformers 5.24 computes in the type that embeddings and norms have in the file, whatever `dtype` it is asked for.

    Args:
        dtype: type of what is not packed; "auto" is the 16-bit type that holds its numbers.
        dense_bits: write layers of this many bits or more in `dtype`; 0 for none but those of 16.
        pad: one rank for all projections of the adapter, with the scale in B.
    """

    clients: ClassVar[Mapping[str, Mapping[str, Any]]] = {"transformers": {}}

    def __init__(self, dtype: Literal["auto"] | Dense = "auto", dense_bits: int = 0, pad: bool = False) -> None:
        if dtype != "auto" and dtype not in get_args(Dense):
            raise ConfigurationError(f"dtype must be 'auto' or one of {get_args(Dense)}, got {dtype!r}")
        require_bits(dense_bits)
        self.dtype, self.dense_bits, self.pad = dtype, dense_bits, pad

    @property
    def takes(self) -> str:
        """transformers with bitsandbytes."""
        return "transformers with bitsandbytes"

    @property
    def holds(self) -> Holding:
        """nf4 or int8."""
        return Holding(
            "nf4 and 16 bits, or int8 and 16 bits: the very codes; 4 and 8 bits together, and others, refused",
            "every method, as a PEFT folder beside it, a rank for each projection; with --pad one rank",
            "codes and their scales exactly; what bitsandbytes multiplies by depends on mode and processor",
        )

    def tolerance(self, backbone: Backbone) -> float:
        """That of exact weights, or of the type of what is not packed where that rounds it."""
        kinds = self._kinds(backbone)
        return rounding(backbone, self._dtype(backbone), {name: kind is None for name, kind in kinds.items()})

    def check(self, backbone: Backbone) -> None:
        """Raise `QuantizationError` for codes that are not of bitsandbytes, or of both its kinds."""
        require_named_files(backbone)
        kinds = self._kinds(backbone)
        found = {kind: name for name, kind in reversed(kinds.items()) if kind is not None}
        if not found:
            raise QuantizationError("every layer would be written in 16 bits; export 'dense'")
        if len(found) > 1:
            raise QuantizationError(
                f"{found['nf4']} has 4 bits and {found['int8']} 8, and transformers makes all packed layers of one "
                "kind; give --dense-bits 8 to write those of 8 bits in 16, or export 'packed', which holds both"
            )

    def serving(self, wanted: Wanted) -> Serving:
        """Quantisers of one kind, and the names of the model's files."""
        from qratk.exporters._folder import is_converted

        packed = [p for p in wanted.packings if not written_dense(p.bits, self.dense_bits)]
        refused = [
            f"{packing} is no code of bitsandbytes, which has nf4 and int8: give model.quantizers: {{4: nf4}}"
            for packing in packed
            if packing.quantizer.component_name not in ("nf4", "int8")
        ]
        if len({packing.quantizer.component_name for packing in packed}) > 1 and not refused:
            refused.append(
                "transformers makes all packed layers of one kind, nf4 or int8: give search.bits: [4, 16] or [8, 16]"
            )
        if wanted.backbone is not None and is_converted(wanted.backbone):
            refused.append(f"files of {type(wanted.backbone.base).__name__} are not named as its projections")
        return Serving(tuple(refused))

    def notes(self, backbone: Backbone) -> Sequence[str]:
        """What bitsandbytes' own layers do."""
        kinds = self._kinds(backbone)
        packed = [name for name, kind in kinds.items() if kind is not None]
        if kinds[packed[0]] == "int8":
            notes = ["Linear8bitLt quantises activations, too, in eval mode: logits differ by about .2 %"]
        else:
            notes = ["Linear4bit multiplies in bfloat16 in eval mode on CPUs with AVX512-BF16: about .4 % off a layer"]
            block = {name: _nf4(backbone.banks[name]).block_size for name in packed}
            if odd := [name for name in packed if backbone.banks[name].shape[1] % block[name]]:
                notes.append(
                    f"rows of {odd[0]} hold no whole number of blocks of {block[odd[0]]}: bitsandbytes reads such "
                    "layers wrongly on CPUs with AVX512; load it on CUDA"
                )
            if odd := [name for name in packed if backbone.banks[name].shape[0] % _VECTORISED_OUTPUTS]:
                notes.append(
                    f"outputs of {odd[0]} do not divide by {_VECTORISED_OUTPUTS}: bitsandbytes refuses such layers on "
                    "CPUs with AVX512-BF16; load it on CUDA"
                )
        if (dtype := self._dtype(backbone)) != backbone.compute_dtype:
            told, scored = (str(kind).removeprefix("torch.") for kind in (dtype, backbone.compute_dtype))
            notes.append(
                f"transformers computes in {told}, the type of the file, and scores were of {scored}: --dtype {scored} "
                "computes in that"
            )
        if has_adapter(backbone):
            notes.append(f"the adapter lies in {ADAPTER}, for PEFT")
        return notes

    def write(self, backbone: Backbone, directory: Path) -> None:
        """Write projection by projection."""
        kinds, dtype = self._kinds(backbone), self._dtype(backbone)

        def packing(name: str, bank: BankLinear) -> Iterator[tuple[str, torch.Tensor]] | None:
            kind = kinds[name]
            return None if kind is None else _packed_4bit(name, bank) if kind == "nf4" else _packed_8bit(name, bank)

        write_folder(backbone, directory, dtype, packing, _settings(backbone, kinds), pad=self.pad)

    def reload(self, backbone: Backbone, directory: Path) -> nn.Module:
        """The folder, by the tables that are in it, with the adapter beside it."""
        from qratk.exporters._bitsandbytes_reader import read_bitsandbytes

        packed = [name for name, kind in self._kinds(backbone).items() if kind is not None]
        return read_folder(backbone, directory, read_bitsandbytes(directory), packed)

    def _dtype(self, backbone: Backbone) -> torch.dtype:
        import torch

        found: torch.dtype = narrowest(backbone) if self.dtype == "auto" else getattr(torch, self.dtype)
        return found

    def _kinds(self, backbone: Backbone) -> dict[str, str | None]:
        """The quantiser of each projection; None for 16 bits. Raises `QuantizationError` for another one."""
        found: dict[str, str | None] = {}
        for name, bank in backbone.banks.items():
            variant = bank.require(bank.active, bank.active_rank)
            if written_dense(variant.bits, self.dense_bits):
                found[name] = None
                continue
            kind = variant.quantizer.component_name or type(variant.quantizer).__name__
            if kind not in ("nf4", "int8"):
                raise QuantizationError(
                    f"{name}: {kind} at {variant.bits} bits is no code of bitsandbytes, which has nf4 and int8; {_CURE}"
                )
            found[name] = kind
        return found


def _nf4(bank: BankLinear) -> Any:
    """The quantiser of a projection in nf4."""
    return bank.require(bank.active, bank.active_rank).quantizer


def _packed_4bit(name: str, bank: BankLinear) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of a `Linear4bit`: codes, maxima and tables, and what else there is to know as JSON in bytes."""
    import torch

    variant = bank.require(bank.active, bank.active_rank)
    packed, quantizer = variant.packed, cast(Any, variant.quantizer)
    state = quantizer.quant_state(packed, bank.shape, torch.float32)
    told: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": quantizer.block_size,
        "dtype": "float32",
        "shape": list(bank.shape),
    }
    yield f"{name}.weight", packed[quantizer.CODES]
    yield f"{name}.weight.absmax", packed["absmax"]
    yield f"{name}.weight.quant_map", state.code.clone()
    if state.nested:
        yield f"{name}.weight.nested_absmax", packed["nested_absmax"]
        yield f"{name}.weight.nested_quant_map", state.state2.code.clone()
        told |= {
            "nested_blocksize": state.state2.blocksize,
            "nested_dtype": "float32",
            "nested_offset": packed["offset"].item(),
        }
    yield f"{name}.weight.{STATE}", torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8)


def _packed_8bit(name: str, bank: BankLinear) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of a `Linear8bitLt`: codes, maxima of rows, and 0 for the order of rows."""
    import torch

    variant = bank.require(bank.active, bank.active_rank)
    yield f"{name}.weight", variant.packed[variant.quantizer.CODES]
    yield f"{name}.SCB", variant.packed["absmax"]
    yield f"{name}.weight_format", torch.tensor(0, dtype=torch.uint8)


def _settings(backbone: Backbone, kinds: Mapping[str, str | None]) -> dict[str, Any]:
    """`quantization_config` of config.json."""
    packed = [name for name, kind in kinds.items() if kind is not None]
    settings: dict[str, Any] = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": _left(backbone, set(packed))}
    if kinds[packed[0]] == "int8":
        return settings | {"load_in_8bit": True, "load_in_4bit": False}
    return settings | {
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": bool(_nf4(backbone.banks[packed[0]]).double_quantization),
        "bnb_4bit_compute_dtype": str(backbone.compute_dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
    }


def _left(backbone: Backbone, packed: set[str]) -> list[str]:
    """Names of linear modules that are not packed: transformers would make empty layers of bitsandbytes of them."""
    from qratk.backbone.layers import is_projection
    from qratk.exporters._skeleton import empty_like

    return [n for n, m in empty_like(backbone).named_modules() if is_projection(m) and n not in packed]
