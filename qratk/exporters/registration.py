"""Lets transformers load the form `packed`: its class is registered when transformers comes to have the registry."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Final

_HOME: Final = "transformers.quantizers.auto"


def announce() -> None:
    """From now on `AutoModelForCausalLM.from_pretrained` takes folders of the form `packed`.

    Nothing is imported for that: where transformers is not there yet, its registry is written to when it is loaded.
    """
    if (module := sys.modules.get(_HOME)) is not None:
        _register(module)
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


def _register(module: ModuleType) -> None:
    """Enter our classes; nothing with a transformers that takes no others."""
    if hasattr(module, "register_quantizer"):
        ours = import_module("qratk.exporters._transformers")
        enter = getattr(ours, "enter", None)
        if enter is not None:  # else it is being imported, and enters them at its end
            enter(module)


class _Watch(MetaPathFinder):
    """Finds one module as all others do, and has something done once it is loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The specification of transformers' registry, and of no other module."""
        if fullname != _HOME:
            return None
        sys.meta_path.remove(self)
        for finder in sys.meta_path:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Then(spec.loader)
                return spec
        return None


class _Then(Loader):
    """Another loader, after which our classes are registered."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """What the other loader makes."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Load, give the module back its own loader, and register."""
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _register(module)
