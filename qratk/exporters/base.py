"""The contract of exporters."""

from __future__ import annotations

import os
import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final

from qratk.core.errors import ConfigurationError, RunDirectoryError
from qratk.core.intact import write_sums
from qratk.registry import Registry

if TYPE_CHECKING:
    from torch import nn

    from qratk.backbone.backbone import Backbone
    from qratk.bank.linear import BankLinear
    from qratk.quantizers.base import AffineGrid


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


class Exporter(ABC):
    """Writes the active configuration of a backbone, with its adapters as stored, as a folder of one form."""

    component_name: ClassVar[str | None] = None
    """The name that it is registered under; None for a class that is not."""

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


exporters: Registry[Exporter] = Registry("exporters", "Exporter")
