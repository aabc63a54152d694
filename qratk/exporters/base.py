"""The contract of exporters."""

from __future__ import annotations

import os
import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from qratk.bank.table import describe, local_name
from qratk.core.errors import ConfigurationError, RunDirectoryError
from qratk.core.intact import write_sums
from qratk.registry import Registry

if TYPE_CHECKING:
    from torch import nn

    from qratk.adapters.base import AdapterMethod
    from qratk.backbone.backbone import Backbone
    from qratk.bank.linear import BankLinear
    from qratk.quantizers.base import AffineGrid, GridForm, Quantizer


EXACT: Final = 3e-4
"""Tolerance of a form that holds the very weights: what other orders of sums in float32 may come to."""


@dataclass(frozen=True)
class Holding:
    """What a form can hold, in words, for help and documentation.

    Attributes:
        weights: quantisers and bit-widths that are written, and how.
        adapters: methods and ranks of adapters, and how they are written.
        equality: what the logits of what is read again are equal to, and how nearly.
    """

    weights: str
    adapters: str
    equality: str


@dataclass(frozen=True, eq=False)
class Wanted:
    """What a search may hand over, as far as it is known before weights are loaded.

    Attributes:
        granularity: what shares one choice of bits and rank; see `find_layers`.
        quantizers: of each bit-width on the ladder.
        method: of adapters.
        backbone: the model on the meta device; None while settings alone are known.
    """

    granularity: str
    quantizers: Mapping[int, Quantizer]
    method: AdapterMethod
    backbone: Backbone | None = None

    @property
    def packings(self) -> tuple[Packing, ...]:
        """How projections may be packed: each way once, with the first projection that is, where there is a model."""
        if self.backbone is None:
            return tuple(Packing(bits, quantizer) for bits, quantizer in self.quantizers.items())
        found: dict[tuple[int, int, str, int | None], Packing] = {}
        for layer in self.backbone.layers:
            for name, bank in layer.modules:
                for bits in self.quantizers:
                    chosen = self.backbone.table.choose(layer.name, local_name(layer.name, name), bank.shape, bits)
                    form = chosen.quantizer.grid_form(chosen.bits)
                    # A group of a whole row has as many weights as the row.
                    row = bank.shape[1] if form is not None and form.group_size is None else None
                    key = (bits, chosen.bits, describe(chosen.quantizer), row)
                    packing = Packing(chosen.bits, chosen.quantizer, name, bank.shape)
                    found.setdefault(key, packing)
        return tuple(found.values())


@dataclass(frozen=True, eq=False)
class Packing:
    """A way to pack projections: bits, quantizer, and the first projection of that way with its shape (d_out, d_in)."""

    bits: int
    quantizer: Quantizer
    name: str | None = None
    shape: tuple[int, int] | None = None

    @property
    def form(self) -> GridForm | None:
        """How its grids are laid out; None where there are none, as at 16 bits."""
        return self.quantizer.grid_form(self.bits)

    @property
    def group_size(self) -> int | None:
        """Weights that share a scale; None where that is not known yet, or there are no grids."""
        if self.form is None or self.form.group_size is not None:
            return None if self.form is None else self.form.group_size
        return None if self.shape is None else self.shape[1]

    def __str__(self) -> str:
        kind = self.quantizer.component_name or type(self.quantizer).__name__
        where = "" if self.name is None else f" ({self.name})"
        return f"{self.bits} bits by {kind}{where}"


@dataclass(frozen=True)
class Serving:
    """What a form says to a search that is to be served by it.

    Attributes:
        refused: what it cannot hold or its client cannot multiply by, each with what to do; none where all can be.
        noted: what a person should know besides, as bits that take more bytes there.
    """

    refused: tuple[str, ...] = ()
    noted: tuple[str, ...] = ()


class Exporter(ABC):
    """Writes the active configuration of a backbone, with its adapters as stored, as a folder of one form."""

    component_name: ClassVar[str | None] = None
    """The name that it is registered under; None for a class that is not."""
    clients: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """What serves the very codes from this form, as `search.for` names it, and the options that each is written with.

    A class with clients overrides `serving`.
    """

    @property
    @abstractmethod
    def takes(self) -> str:
        """What reads the form, as the end of the sentence "a folder for ..."."""

    @property
    def holds(self) -> Holding:
        """What the form can hold."""
        return Holding("not told", "not told", "not told")

    def tolerance(self, backbone: Backbone) -> float:
        """Mean difference of logits that a self-check passes, as a share of their spread; see `SelfCheck`."""
        return EXACT

    def serving(self, wanted: Wanted) -> Serving:
        """What of a search can be served from this form; asked twice: of its settings, and with its model."""
        return Serving()

    @abstractmethod
    def check(self, backbone: Backbone) -> None:
        """Raise `QratkError`, saying why and what to do, when the form cannot hold what is active."""

    @abstractmethod
    def write(self, backbone: Backbone, directory: Path) -> None:
        """Fill an empty directory; `check` was passed."""

    def notes(self, backbone: Backbone) -> Sequence[str]:
        """What a person should know of this export besides."""
        return ()

    def reload(self, backbone: Backbone, directory: Path) -> nn.Module | None:
        """A model in float32 of what `write` wrote, adapters included, by the rules of the form; None for no check.

        Of the backbone it takes what the form leaves out alone: the class of the model, and the base under an adapter.
        It is called as a Hugging Face model is, with `input_ids`.
        """
        return None

    def export(self, backbone: Backbone, directory: str | Path) -> Path:
        """Folder that holds all of the form and its digests, or is not there at all; nothing is overwritten.

        Raises `ConfigurationError` when nothing is active, `RunDirectoryError` when the folder holds something or
        cannot be written, and what `check` raises.
        """
        target = Path(directory)
        if backbone.configuration is None:
            raise ConfigurationError("no configuration is active; call `backbone.activate` first")
        require_free(target)
        self.check(backbone)
        part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
        try:
            part.mkdir(parents=True)
            self.write(backbone, part)
            write_sums(part)
            os.replace(part, target)
        except OSError as error:
            raise RunDirectoryError(f"cannot write {target}: {error}. Free some space, or name another folder") from (
                error
            )
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return target


def require_free(target: Path) -> None:
    """Raise `RunDirectoryError` where a folder that is to be written holds something already."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RunDirectoryError(f"{target} is there already; name a new folder, or remove it first")


def grid_of(bank: BankLinear) -> AffineGrid | None:
    """The active codes of a projection on their grid; None where there is none."""
    variant = bank.require(bank.active, bank.active_rank)
    return variant.quantizer.affine_grid(variant.packed, bank.shape, variant.bits)


def has_adapter(backbone: Backbone) -> bool:
    """Whether a projection has an adapter."""
    return any(backbone.adapters.rank(name) for name in backbone.banks)


def plain_lora(wanted: Wanted, client: str) -> tuple[str, ...]:
    """A refusal of adapters that are more than LoRA, for forms whose clients take that alone."""
    if wanted.method.is_lora:
        return ()
    name = wanted.method.component_name or type(wanted.method).__name__
    return (f"{client} takes LoRA beside packed weights, and model.adapter is {name}: give lora or cut",)


exporters: Registry[Exporter] = Registry("exporters", "Exporter")
