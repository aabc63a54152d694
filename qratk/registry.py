"""Open sets by name: in-process by decorator, third parties by entry point, errors that help."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from qratk.core.errors import ConfigurationError, DuplicateComponentError, PluginError, UnknownComponentError
from qratk.core.text import nearest

T = TypeVar("T")


@dataclass(frozen=True)
class Option:
    """One constructor option of a component: its name, annotation as text, and default (`REQUIRED` if none)."""

    name: str
    annotation: str
    default: Any


REQUIRED: Any = inspect.Parameter.empty


class Registry(Generic[T]):
    """Names of one open set, say "repairs".

    Built-in strategies are the classes that the modules of the package `qratk.<kind>` register by decorator; those
    modules, except for helpers with a leading underscore, are imported when a name is first asked for. Third-party
    strategies are entry points of the group `qratk.<kind>`; each is imported only when its own name is asked for.
    """

    def __init__(self, kind: str, base: str) -> None:
        self.kind = kind
        self.base = base
        self._registered: dict[str, type[T]] = {}
        self._plugins: dict[str, EntryPoint] | None = None
        self._scanned = False

    def register(self, name: str) -> Callable[[type[Any]], type[Any]]:
        """Class decorator that registers a strategy under a name; raises `DuplicateComponentError`."""

        def add(cls: type[Any]) -> type[Any]:
            owner = self._registered.get(name)
            if owner is not None and _path(owner) != _path(cls):
                raise DuplicateComponentError(
                    f"{self.kind}: the name {name!r} is registered by {_path(owner)} and again by {_path(cls)}; "
                    "rename one of them"
                )
            self._registered[name] = cls
            cls.component_name = name
            return cls

        return add

    def names(self) -> tuple[str, ...]:
        """All known names in order, built-in and third-party; imports no third-party package."""
        self._scan()
        return tuple(sorted({*self._registered, *self._find_plugins()}))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def get(self, name: str) -> type[T]:
        """The class registered under a name; raises `UnknownComponentError` or `PluginError`."""
        self._scan()
        plugin = self._find_plugins().get(name)
        if name in self._registered:
            return self._registered[name]
        if plugin is None:
            raise UnknownComponentError(self._unknown(name))
        cls: type[T] = _load(plugin, self.kind)
        if not self._is_component(cls):
            raise PluginError(
                f"{self.kind}: {name!r} of package {_package(plugin)} is {plugin.value}, which is no concrete "
                f"subclass of {self.base}; report this to that package, or uninstall it"
            )
        self._registered[name] = cls
        setattr(cls, "component_name", name)  # noqa: B010
        return cls

    def create(self, name: str, **options: Any) -> T:
        """Strategy built with plain options; an unknown or missing option raises `ConfigurationError`."""
        cls = self.get(name)
        known = {option.name: option for option in self.options(name)}
        for given in options:
            if given not in known:
                raise ConfigurationError(
                    f"{self.kind}: {name!r} has no option {given!r}; its options are {sorted(known) or 'none'}"
                    + nearest(given, known)
                )
        missing = [o.name for o in known.values() if o.default is REQUIRED and o.name not in options]
        if missing:
            raise ConfigurationError(f"{self.kind}: {name!r} needs a value for {missing}")
        return cls(**options)

    def options(self, name: str) -> tuple[Option, ...]:
        """Constructor options of a strategy."""
        parameters = inspect.signature(self.get(name)).parameters.values()
        return tuple(Option(p.name, _annotation(p), p.default) for p in parameters)

    def class_path(self, name: str) -> str:
        """Import path of the class registered under a name."""
        return _path(self.get(name))

    def name_of(self, path: str) -> str | None:
        """Name of the class with an import path, if it has one here.

        Package and class name decide, so that the path of a file from which the class has moved is understood too.
        """
        self._scan()
        package, class_name = path.partition(".")[0], path.rpartition(".")[2]
        plugins = self._find_plugins()
        for name, entry in plugins.items():
            if name not in self._registered and (_top(entry.module), entry.attr) == (package, class_name):
                return name
        named = {
            name: _path(cls)
            for name, cls in self._registered.items()
            if (name in plugins or package == "qratk") and (_top(cls.__module__), cls.__name__) == (package, class_name)
        }
        exact = [name for name, known in named.items() if known == path]
        return next(iter([*exact, *named]), None)

    def owner(self, name: str) -> str:
        """The package that provides a name."""
        plugin = self._find_plugins().get(name)
        return _package(plugin) if plugin is not None else "qratk"

    def _scan(self) -> None:
        if self._scanned:
            return
        package = importlib.import_module(f"qratk.{self.kind}")
        for module in pkgutil.iter_modules(package.__path__):
            if not module.name.startswith("_"):  # helpers, which may be heavy, and register nothing
                importlib.import_module(f"{package.__name__}.{module.name}")
        self._scanned = True

    def _find_plugins(self) -> dict[str, EntryPoint]:
        if self._plugins is None:
            found: dict[str, EntryPoint] = {}
            for entry in entry_points(group=f"qratk.{self.kind}"):
                other = found.get(entry.name)
                if other is not None and other.value != entry.value:
                    raise DuplicateComponentError(
                        f"{self.kind}: the name {entry.name!r} comes from {_package(other)} and from "
                        f"{_package(entry)}; uninstall one of them"
                    )
                found[entry.name] = entry
            self._scan()
            for name in found.keys() & self._registered.keys():
                raise DuplicateComponentError(
                    f"{self.kind}: the name {name!r} is qratk's own ({_path(self._registered[name])}), and "
                    f"{_package(found[name])} brings it too; uninstall that package or rename its component"
                )
            self._plugins = found
        return self._plugins

    def _is_component(self, cls: object) -> bool:
        if not inspect.isclass(cls) or inspect.isabstract(cls):
            return False
        return any(base.__name__ == self.base and base.__module__.startswith("qratk.") for base in cls.__mro__)

    def _unknown(self, name: str) -> str:
        names = self.names()
        return f"{self.kind}: unknown name {name!r}; known are {', '.join(names)}" + nearest(name, names)


def _path(cls: type[Any]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _top(module: str) -> str:
    return module.partition(".")[0]


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else entry.value


def _load(entry: EntryPoint, kind: str) -> Any:
    try:
        return entry.load()
    except Exception as error:  # whatever a third party's import raises is that package's failure
        raise PluginError(
            f"{kind}: {entry.name!r} of package {_package(entry)} cannot be loaded from {entry.value}: "
            f"{type(error).__name__}: {error}. Update or uninstall that package."
        ) from error


def _annotation(parameter: inspect.Parameter) -> str:
    if parameter.annotation is inspect.Parameter.empty:
        return ""
    return (
        parameter.annotation
        if isinstance(parameter.annotation, str)
        else inspect.formatannotation(parameter.annotation)
    )
