"""Checkpoints that a user names: whether they are of a fit, before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch

from qratk.core.errors import ConfigurationError
from qratk.core.intact import require_intact_archive

_KEYWORDS: Final = ("best", "last", "hpc")  # that Lightning looks up by itself


def require_checkpoint(given: str) -> None:
    """Raise `ConfigurationError` where a path is no checkpoint of a fit; nothing in the file is executed."""
    if given in _KEYWORDS or given.startswith("registry") or "://" in given:
        return
    path = Path(given)
    if not path.exists():
        raise ConfigurationError(f"--ckpt_path={given}: there is no such file")
    if path.is_dir():  # sharded ones are folders, which their strategy reads
        return
    require_intact_archive(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ConfigurationError(
            f"--ckpt_path={given}: this is no checkpoint of a fit, or it is damaged or cut off ({type(error).__name__} "
            "while it was read as data); `qratk fit` writes them to LOG_DIR/checkpoints"
        ) from error
    missing = [key for key in ("state_dict", "configuration") if not isinstance(found, Mapping) or key not in found]
    if missing:
        raise ConfigurationError(
            f"--ckpt_path={given}: this is no checkpoint of a fit: it has no {' and no '.join(missing)}; "
            "`qratk fit` writes them to LOG_DIR/checkpoints"
        )
