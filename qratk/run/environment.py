"""What ran a search: versions, interpreter, machine."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Final

LIBRARIES: Final = (
    "qratk", "bitsandbytes", "botorch", "datasets", "gpytorch", "hqq", "lightning", "lm-eval", "matplotlib", "numpy",
    "peft", "pymoo", "safetensors", "scipy", "tensorboard", "torch", "torchmetrics", "transformers",
)  # fmt: skip


@dataclass(frozen=True)
class Environment:
    """Library versions, interpreter, platform, and torch's threads and device where it was loaded."""

    python: str = ""
    platform: str = ""
    processors: int | None = None
    libraries: Mapping[str, str] | None = None
    torch_threads: int | None = None
    device: str | None = None

    @classmethod
    def here(cls) -> Environment:
        """The environment of this process."""
        torch = sys.modules.get("torch")  # not imported for this: a search without torch stays without it
        return cls(
            platform.python_version(),
            platform.platform(),
            os.cpu_count(),
            _versions(),
            None if torch is None else torch.get_num_threads(),
            None if torch is None else torch.cuda.get_device_name() if torch.cuda.is_initialized() else "cpu",
        )


def _versions() -> dict[str, str]:
    import qratk

    versions = {"qratk": getattr(qratk, "__version__", "unknown")}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions
