"""Gaussian process glue; `model` imports BoTorch, so it is loaded only when a proposal is made."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType


def load() -> ModuleType:
    """The module `model`."""
    with warnings.catch_warnings():
        # linear_operator applies torch.jit.script on import, which torch 2.13 announces as deprecated.
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module(f"{__name__}.model")
