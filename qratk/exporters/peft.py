"""The adapter alone, for PEFT over the base model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qratk.core.errors import ConfigurationError
from qratk.exporters.base import Exporter, exporters

if TYPE_CHECKING:
    from qratk.backbone.backbone import Backbone


@exporters.register("peft")
class PeftExporter(Exporter):
    """`adapter_config.json` and `adapter_model.safetensors`, with the rank of every projection in them.

    Over the unquantised base that is close to what was trained; over `native_model` it is equal to the bit.
    """

    @property
    def takes(self) -> str:
        """PEFT."""
        return "PEFT over the base model"

    def check(self, backbone: Backbone) -> None:
        """Raise `ConfigurationError` when there is no adapter."""
        assert backbone.configuration is not None
        if not any(backbone.configuration.ranks):
            raise ConfigurationError(
                "every layer has rank 0, so that there is no adapter; export the model itself: 'dense' or 'packed'"
            )

    def write(self, backbone: Backbone, directory: Path) -> None:
        """Write the adapter in the stored 16 bits."""
        assert backbone.configuration is not None
        backbone.save_adapter(directory, backbone.configuration)
