"""Objects and settings of a call as a configuration file has them: plain data, components by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qratk.components import REGISTRIES
from qratk.settings.names import DATA, DATA_CLASSES, SLOTS, registered_name

if TYPE_CHECKING:
    from qratk.data.base import TaskData
    from qratk.training.module import FineTuneModule


@dataclass(frozen=True)
class Description:
    """A configuration that describes a call.

    Attributes:
        document: the sections `model`, `data`, `trainer` and `search`.
        unwritable: keys of what no file can hold, and `document` only names.
    """

    document: Mapping[str, Any]
    unwritable: tuple[str, ...] = ()


def described(
    module: FineTuneModule, datamodule: TaskData, trainer: Mapping[str, Any], settings: Mapping[str, Any]
) -> Description:
    """What a call says, as the file that says the same would."""
    writer = _Writer()
    document = {
        "model": writer.plain(dict(module.hparams), "model"),
        "data": writer.data(datamodule),
        "trainer": writer.plain(trainer, "trainer"),
        "search": {key: writer.setting(key, value) for key, value in settings.items()},
    }
    return Description(document, tuple(writer.unwritable))


@dataclass
class _Writer:
    """Writes values down, and remembers those of which it could only write a name."""

    unwritable: list[str] = field(default_factory=list)

    def setting(self, key: str, value: Any) -> Any:
        """A setting of the search, a component or a list of them where the setting takes those."""
        if key not in SLOTS:
            return self.plain(value, f"search.{key}")
        if isinstance(value, Sequence) and not isinstance(value, str):
            return [self.component(SLOTS[key], item, f"search.{key}.{n}") for n, item in enumerate(value)]
        return self.component(SLOTS[key], value, f"search.{key}")

    def component(self, kind: str, given: Any, where: str) -> Any:
        """A component that was given as a name, as {name: options}, or as an object."""
        if isinstance(given, str):
            return {"class_path": registered_name(kind, given)}
        if isinstance(given, Mapping):
            ((name, options),) = given.items()
            return {"class_path": registered_name(kind, name), "init_args": self.plain(options or {}, where)}
        path = f"{type(given).__module__}.{type(given).__qualname__}"
        name = REGISTRIES[kind].name_of(path) or path
        return {"class_path": name, "init_args": self._options(given, where)}

    def data(self, datamodule: TaskData) -> dict[str, Any]:
        """The data module by its class and arguments."""
        path = f"{type(datamodule).__module__}.{type(datamodule).__qualname__}"
        name = next((name for name, known in DATA_CLASSES.items() if known == path), path)
        return {"class_path": name, "init_args": self.plain(datamodule.arguments, DATA)}

    def plain(self, value: Any, where: str) -> Any:
        """The value as YAML holds it; of another object its class."""
        if isinstance(value, Mapping):
            return {key: self.plain(item, f"{where}.{key}") for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.plain(item, f"{where}.{n}") for n, item in enumerate(value)]
        if isinstance(value, Path):
            return str(value)
        if _is_data(value):
            return self.data(value)
        if is_dataclass(value) and not isinstance(value, type):
            return {own.name: self.plain(getattr(value, own.name), f"{where}.{own.name}") for own in fields(value)}
        if value is None or type(value) in (bool, int, float, str):
            return value
        return self._named(value, where)

    def _options(self, component: object, where: str) -> dict[str, Any]:
        """The constructor's options that the object has as attributes."""
        found: dict[str, Any] = {}
        for name in inspect.signature(type(component)).parameters:
            if hasattr(component, name):
                found[name] = self.plain(getattr(component, name), f"{where}.{name}")
            else:
                self.unwritable.append(f"{where}.{name}")
        return found

    def _named(self, value: object, where: str) -> str:
        self.unwritable.append(where)
        return f"{type(value).__module__}.{type(value).__qualname__}"


def _is_data(value: object) -> bool:
    """Whether a value is a data module, a member of the one that is described."""
    from qratk.data.base import TaskData

    return isinstance(value, TaskData)
