"""The adapter alone, for PEFT over the base model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from qratk.core.errors import ConfigurationError
from qratk.exporters.base import EXACT, Exporter, Holding, exporters
from qratk.exporters.dense import Dense, DenseExporter

if TYPE_CHECKING:
    from torch import nn

    from qratk.backbone.backbone import Backbone

Base = Literal["none", "dequantised"]
BASE, ADAPTER = "base", "adapter"


@exporters.register("peft")
class PeftExporter(Exporter):
    """`adapter_config.json` and `adapter_model.safetensors`, with the rank of every projection in them.

    Over the unquantised base that is close to what was trained; over `native_model` it is equal to
    the bit on one processor.

    Args:
        base: "dequantised" writes the model that was trained over, too: folders `base` and `adapter`.
        pad: one rank for all projections, the largest, with zeros, and the scale in B (in float32 where it is no power
            of two): for clients that know one rank and one alpha.
        dtype: type of the base's weights, as of 'dense'.
    """

    def __init__(self, base: Base = "none", pad: bool = False, dtype: Literal["auto"] | Dense = "auto") -> None:
        if base not in get_args(Base):
            raise ConfigurationError(f"base must be one of {get_args(Base)}, got {base!r}")
        self.base, self.pad = base, pad
        self._dense = DenseExporter(dtype, base=True)
        self.dtype = dtype

    @property
    def takes(self) -> str:
        """PEFT."""
        return "PEFT over the base model"

    @property
    def holds(self) -> Holding:
        """Every adapter."""
        return Holding(
            "none, or with --base dequantised every quantiser, as 16-bit or 32-bit weights",
            "every method, a rank for each projection; with --pad one rank",
            "as scored, over the dequantised base in float32; over the original model the quantisation is lacking",
        )

    def tolerance(self, backbone: Backbone) -> float:
        """That of the base's type."""
        return EXACT if self.base == "none" else self._dense.tolerance(backbone)

    def check(self, backbone: Backbone) -> None:
        """Raise `ConfigurationError` when there is no adapter."""
        assert backbone.configuration is not None
        if not any(backbone.configuration.ranks):
            raise ConfigurationError(
                "every layer has rank 0, so that there is no adapter; export the model itself: 'dense' or 'packed'"
            )

    def write(self, backbone: Backbone, directory: Path) -> None:
        """Write the adapter in the stored 16 bits, and the base where it is asked for."""
        if self.base == "none":
            write_adapter(backbone, directory, pad=self.pad, base=None)
            return
        (directory / BASE).mkdir()
        self._dense.write(backbone, directory / BASE)
        write_adapter(backbone, directory / ADAPTER, pad=self.pad, base=BASE)

    def reload(self, backbone: Backbone, directory: Path) -> nn.Module | None:
        """The adapter over the bank's weights, or over those that were written."""
        from qratk.adapters.matrices.folder import read_pairs
        from qratk.exporters._reading import bank_tensors, reading_model

        if self.base == "none":
            pairs = read_pairs(directory)
            return reading_model(backbone, backbone.config, bank_tensors(backbone), pairs=pairs)
        return self._dense.read(backbone, directory / BASE, pairs=read_pairs(directory / ADAPTER))


def write_adapter(backbone: Backbone, directory: Path, *, pad: bool, base: str | None) -> None:
    """Write the active adapters for PEFT, of their own ranks or padded to one; `base` names the model under them."""
    from qratk.adapters.matrices.folder import name_base, write_padded

    assert backbone.configuration is not None
    if not pad:
        backbone.adapters.save(directory)
        if base is not None:
            name_base(directory, base)
        return
    own = directory.with_name(f".{directory.name}.own")
    try:
        backbone.adapters.save(own)
        write_padded(own, directory, base=base)
    finally:
        shutil.rmtree(own, ignore_errors=True)
