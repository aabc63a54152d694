"""What a fit's checkpoint holds besides Lightning's part: adapters and random states, and no frozen weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from lightning import LightningDataModule, LightningModule
from torch import Tensor

from qratk.core.errors import ConfigurationError
from qratk.core.secrets import without_secrets

_PREFIX: Final = "adapter."


@dataclass(frozen=True)
class FitCheckpoint:
    """The module's part of a checkpoint.

    Attributes:
        configuration: as text.
        adapter: masters by name.
        allocation: state of what follows each step, such as AdaLoRA's allocator; empty for nothing.
        random: state of the CPU's generator; None in checkpoints that have none.
        device_random: state of the CUDA device's.
        compute_dtype: what activations were computed in; None in checkpoints that do not say.
    """

    configuration: str
    adapter: Mapping[str, Tensor]
    allocation: Mapping[str, Tensor]
    random: Tensor | None
    device_random: Tensor | None
    compute_dtype: str | None = None

    def write(self, checkpoint: dict[str, Any]) -> None:
        """Put it into a checkpoint of Lightning's, in place of the weights; secrets of model and data are left out."""
        checkpoint["state_dict"] = {f"{_PREFIX}{name}": value for name, value in self.adapter.items()}
        checkpoint["configuration"] = self.configuration
        checkpoint["allocation"] = self.allocation
        checkpoint["random"] = self.random
        checkpoint["device_random"] = self.device_random
        checkpoint["compute_dtype"] = self.compute_dtype
        for saved in (LightningModule, LightningDataModule):
            if (key := saved.CHECKPOINT_HYPER_PARAMS_KEY) in checkpoint:
                checkpoint[key] = without_secrets(checkpoint[key])

    @classmethod
    def take(cls, checkpoint: dict[str, Any], configuration: str) -> FitCheckpoint:
        """Take it out of a checkpoint of Lightning's, which is left without weights to load.

        Raises `ConfigurationError` when it is of another configuration.
        """
        stored = checkpoint.get("configuration")
        if stored != configuration:
            raise ConfigurationError(
                f"the checkpoint is of configuration {stored!r}, but {configuration!r} was asked for; "
                "give the same --model.configuration as when it was trained"
            )
        weights, checkpoint["state_dict"] = checkpoint["state_dict"], {}
        adapter = {name.removeprefix(_PREFIX): v for name, v in weights.items() if name.startswith(_PREFIX)}
        allocation = checkpoint.get("allocation", {})
        random, device_random = checkpoint.get("random"), checkpoint.get("device_random")
        return cls(configuration, adapter, allocation, random, device_random, checkpoint.get("compute_dtype"))
