"""The contract of exporters."""

from __future__ import annotations

import os
import shutil
import uuid
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from qratk.core.errors import ConfigurationError, RunDirectoryError
from qratk.core.intact import write_sums
from qratk.registry import Registry

if TYPE_CHECKING:
    from qratk.backbone.backbone import Backbone


class Exporter(ABC):
    """Writes the active configuration of a backbone, with its adapters as stored, as a folder of one form."""

    component_name: ClassVar[str | None] = None
    """The name that it is registered under; None for a class that is not."""

    @property
    @abstractmethod
    def takes(self) -> str:
        """What reads the form, as the end of the sentence "a folder for ..."."""

    @abstractmethod
    def check(self, backbone: Backbone) -> None:
        """Raise `QratkError`, saying why and what to do, when the form cannot hold what is active."""

    @abstractmethod
    def write(self, backbone: Backbone, directory: Path) -> None:
        """Fill an empty directory; `check` was passed."""

    def export(self, backbone: Backbone, directory: str | Path) -> Path:
        """Folder that holds all of the form and its digests, or is not there at all; nothing is overwritten.

        Raises `ConfigurationError` when nothing is active, `RunDirectoryError` when the folder holds something or
        cannot be written, and what `check` raises.
        """
        target = Path(directory)
        if backbone.configuration is None:
            raise ConfigurationError("no configuration is active; call `backbone.activate` first")
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise RunDirectoryError(f"{target} is there already; name a new folder, or remove it first")
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


exporters: Registry[Exporter] = Registry("exporters", "Exporter")
