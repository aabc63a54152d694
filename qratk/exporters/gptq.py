"""GPTQ's checkpoint form, version 2: the codes as they were scored, with bits by layer as GPTQModel reads them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from qratk.core.errors import QuantizationError
from qratk.exporters._grids import (
    ADAPTER,
    CURE,
    read_folder,
    refuse_dora,
    require_bits,
    require_named_files,
    rounding,
    scale_dtype,
    write_folder,
    written_dense,
)
from qratk.exporters.base import Exporter, Holding, exporters, grid_of, has_adapter

if TYPE_CHECKING:
    import torch
    from torch import nn

    from qratk.backbone.backbone import Backbone
    from qratk.bank.linear import BankLinear

SETTINGS: Final = "quantize_config.json"
_GROUPS: Final = (16, 32, 64, 128, 256, 512, 1024)


@exporters.register("gptq")
class GptqExporter(Exporter):
    """A Hugging Face folder in GPTQ's form, version 2 (zero points as they are), and the adapter beside it.

    The commonest bits, groups and symmetry are those of the whole, and `dynamic` has a rule for each projection that
    differs; 16-bit layers are left out by it.

    Args:
        dense_bits: write layers of this many bits or more in 16 bits; 0 for none but those of 16.
        pad: one rank for all projections of the adapter, with the scale in B.
    """

    def __init__(self, dense_bits: int = 0, pad: bool = False) -> None:
        require_bits(dense_bits)
        self.dense_bits, self.pad = dense_bits, pad

    @property
    def takes(self) -> str:
        """GPTQModel."""
        return "GPTQModel"

    @property
    def holds(self) -> Holding:
        """Affine codes with whole zero points."""
        return Holding(
            "affine, affine_gptq, gptq at 2, 3, 4 and 8 bits in groups of 16 to 1024, and 16: the very codes; others "
            "refused",
            "LoRA (not DoRA), as a PEFT folder beside it, a rank for each projection; with --pad one rank",
            "codes, scales and zero points exactly; GPTQModel computes in 16 bits",
        )

    def tolerance(self, backbone: Backbone) -> float:
        """That of exact weights, or of the type of scales where what has 16 bits is rounded to it."""
        schemes = self._schemes(backbone)
        return rounding(backbone, _dtype(backbone, schemes), {name: s is None for name, s in schemes.items()})

    def check(self, backbone: Backbone) -> None:
        """Raise `QuantizationError` for codes that the form cannot hold."""
        require_named_files(backbone)
        refuse_dora(backbone, "GPTQModel")
        schemes = self._schemes(backbone)
        if not any(schemes.values()):
            raise QuantizationError("every layer would be written in 16 bits; export 'dense'")
        _dtype(backbone, schemes)

    def notes(self, backbone: Backbone) -> Sequence[str]:
        """What it takes to be read."""
        name = str(_dtype(backbone, self._schemes(backbone))).removeprefix("torch.")
        notes = [f"scales are {name}: load with dtype=torch.{name}, another one rounds them"]
        if has_adapter(backbone):
            notes.append(f"the adapter lies in {ADAPTER}, for PEFT")
        return notes

    def write(self, backbone: Backbone, directory: Path) -> None:
        """Write projection by projection."""
        schemes = self._schemes(backbone)
        dtype = _dtype(backbone, schemes)

        def packing(name: str, bank: BankLinear) -> Iterator[tuple[str, torch.Tensor]] | None:
            return None if schemes[name] is None else _packed(name, bank)

        settings = _settings(schemes)
        write_folder(backbone, directory, dtype, packing, settings, pad=self.pad)
        (directory / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def reload(self, backbone: Backbone, directory: Path) -> nn.Module:
        """The folder, unpacked as GPTQModel does, with the adapter beside it."""
        from qratk.exporters._gptq_reader import read_gptq

        packed = [name for name, scheme in self._schemes(backbone).items() if scheme is not None]
        return read_folder(backbone, directory, read_gptq(directory), packed)

    def _schemes(self, backbone: Backbone) -> dict[str, Scheme | None]:
        return {name: self._scheme(name, bank) for name, bank in backbone.banks.items()}

    def _scheme(self, name: str, bank: BankLinear) -> Scheme | None:
        """How a projection is packed; None for 16 bits. Raises `QuantizationError` where it cannot be."""
        variant = bank.require(bank.active, bank.active_rank)
        bits = variant.bits
        if written_dense(bits, self.dense_bits):
            return None
        grid = grid_of(bank)
        otherwise = CURE + ("" if bits < 8 else ", or give --dense-bits 8 to write such layers in 16 bits")
        if grid is None or not grid.whole or grid.scale.element_size() != 2 or grid.group_size not in _GROUPS:
            quantizer = variant.quantizer.component_name or type(variant.quantizer).__name__
            raise QuantizationError(
                f"{name}: {quantizer} at {bits} bits has no 16-bit scales with whole zero points in groups of "
                f"{_GROUPS} weights of a row, as GPTQ's form holds; {otherwise}"
            )
        unit = 32 if bits == 3 else 32 // bits
        if any(side % unit for side in bank.shape):
            raise QuantizationError(
                f"{name}: a side of {bank.shape[0]} x {bank.shape[1]} does not divide by {unit}, as words of "
                f"{bits}-bit codes need in GPTQ's form; export 'dense'"
            )
        return Scheme(bits, grid.group_size, grid.symmetric)


class Scheme(NamedTuple):
    """Bits of a projection, size of a group, and whether zero points are half of the range by construction."""

    bits: int
    group_size: int
    symmetric: bool


def _dtype(backbone: Backbone, schemes: Mapping[str, Scheme | None]) -> torch.dtype:
    return scale_dtype(backbone, (name for name, scheme in schemes.items() if scheme is not None))


def _packed(name: str, bank: BankLinear) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of a projection: codes in words along d_in, zero points in words along d_out, groups first."""
    import torch

    from qratk.quantizers.bitstream import pack_words

    grid = grid_of(bank)
    assert grid is not None
    yield f"{name}.qweight", pack_words(grid.codes, grid.bits).t().contiguous()
    yield f"{name}.qzeros", pack_words(grid.zero.to(torch.uint8).t(), grid.bits).contiguous()
    yield f"{name}.scales", grid.scale.t().contiguous()
    yield f"{name}.g_idx", torch.arange(bank.shape[1], dtype=torch.int32) // grid.group_size


def _settings(schemes: Mapping[str, Scheme | None]) -> dict[str, Any]:
    """`quantization_config` of config.json, and all of `quantize_config.json`."""
    common = Counter(scheme for scheme in schemes.values() if scheme is not None).most_common(1)[0][0]
    dynamic: dict[str, dict[str, Any]] = {}
    for name, scheme in schemes.items():
        if scheme is None:
            dynamic[f"-:^{re.escape(name)}$"] = {}
        elif scheme != common:
            dynamic[f"+:^{re.escape(name)}$"] = _told(scheme)
    return {
        "quant_method": "gptq",
        **_told(common),
        "desc_act": False,
        "checkpoint_format": "gptq_v2",
        "pack_dtype": "int32",
        "lm_head": False,
        "dynamic": dynamic,
    }


def _told(scheme: Scheme) -> dict[str, Any]:
    return {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.symmetric}
