"""scikit-learn's regressors; `models` imports it, so it is loaded only when a model is fitted."""

from __future__ import annotations

import importlib
from types import ModuleType


def load() -> ModuleType:
    """The module `models`."""
    return importlib.import_module(f"{__name__}.models")
