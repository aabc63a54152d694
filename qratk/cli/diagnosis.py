"""All that is wrong with the settings of a command, each with its place: parsing stops at the first mistake."""

from __future__ import annotations

import re
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml
from jsonargparse import Namespace

from qratk.cli.messages import shortened
from qratk.cli.parser import COMMANDS, CommandParser
from qratk.components import REGISTRIES
from qratk.core.errors import QratkError
from qratk.settings import names
from qratk.settings.reading import SettingsLoader, read_settings
from qratk.settings.recipe import RECIPE

Keys = tuple[Any, ...]
"""Where a setting stands: the keys that lead to it."""

_SPECIFICATION: Final = ("class_path", "init_args")
_NULLS: Final = (None, "null", "~")
_PAIR: Final = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")


@dataclass(frozen=True)
class Mistake:
    """A setting, by its keys, and what is wrong with it."""

    keys: Keys
    text: str


@dataclass(frozen=True)
class Source:
    """Settings of a file, or of one argument of the command line, and the place of each by its keys."""

    document: Mapping[Any, Any]
    places: Mapping[Keys, str]
    argument: str | None = None

    @classmethod
    def of_file(cls, path: Path) -> Source:
        """Settings of a YAML file; raises `ConfigurationError`."""
        document = read_settings(path)
        root = yaml.compose(path.read_text(encoding="utf-8-sig"), Loader=SettingsLoader)
        return cls(document, {keys: f"{path}:{line}" for keys, line in _lines(root, ())})

    @classmethod
    def of_argument(cls, name: str, value: str) -> Source:
        """Settings of `--name value`."""
        keys = tuple(name.split("."))
        document: Any = value
        for key in reversed(keys):
            document = {key: document}
        return cls(document, {keys: f"--{name}"}, f"--{name}={value}")

    def without(self, mistakes: Sequence[Mistake]) -> Mapping[Any, Any]:
        """The document without some settings."""
        wrong = {mistake.keys for mistake in mistakes}
        return _pruned(self.document, (), wrong)


def pairs_for_numbers(sources: Sequence[Source], settings: Namespace) -> list[Mistake]:
    """Mistakes of pairs such as 4:8 that a parser took for one number to the base of 60, here 248."""
    found = []
    for source in sources:
        for keys, value in _leaves(source.document):
            if isinstance(value, str) and _PAIR.fullmatch(value):
                inner = (*keys[:-1], "init_args", keys[-1])
                taken = (settings.get(".".join(map(str, path))) for path in (keys, inner))
                if any(isinstance(number, int | float) for number in taken):
                    found.append(Mistake(keys, f"expected a number, got {value!r}"))
    return found


class Diagnosis:
    """Finds what a parser refuses in several sources, by parsing parts of them.

    `mistakes` are found when it is made; `config` are the settings that are left, as parsed.
    """

    def __init__(self, parser: CommandParser, sources: Sequence[Source]) -> None:
        self._parser = parser
        self.config: Namespace | None = None
        found: list[Mistake] = []
        for source in sources:
            wrong = list(_null_components(source))
            if source.argument is not None:
                found += wrong or self._of_argument(source, source.argument)
                continue
            left = Source(source.without(wrong), source.places)
            wrong += self._mistakes(left, [(key,) for key in left.document])
            self._parse(source.without(wrong), keep=True)
            found += wrong
        self.mistakes = tuple(found)

    def _mistakes(self, source: Source, units: Sequence[Keys]) -> Iterator[Mistake]:
        """Mistakes below some keys: halves of them are parsed until one alone is refused, then what it holds."""
        if not units:
            return
        error = self._parse(_selected(source.document, units))
        if error is None:
            return
        if len(units) > 1:
            middle = len(units) // 2
            yield from self._mistakes(source, units[:middle])
            yield from self._mistakes(source, units[middle:])
            return
        inner = list(self._within(source, units[0]))
        yield from inner or [Mistake(units[0], shortened(error, units[0], self._parser.settings))]

    def _within(self, source: Source, keys: Keys) -> Iterator[Mistake]:
        value = _at(source.document, keys)
        if not isinstance(value, Mapping):
            return
        if "class_path" in value:
            wrong = list(self._mistakes(source, [(*keys, "class_path")]))
            if wrong:
                yield from wrong
                return
        options = value.get("init_args")
        inner = [(*keys, key) for key in value if key not in _SPECIFICATION]
        inner += [(*keys, "init_args", key) for key in options] if isinstance(options, Mapping) else []
        yield from self._mistakes(source, inner)

    def _of_argument(self, source: Source, argument: str) -> list[Mistake]:
        (keys,) = source.places
        error = self._said(lambda: self._parser.parse_args([argument], namespace=self.config))
        if error is not None and "arguments are required" not in error:
            return [Mistake(keys, shortened(error, keys, self._parser.settings))]
        self._said(lambda: self._parser.parse_args([argument], namespace=self.config, _skip_validation=True), keep=True)
        return []

    def _parse(self, document: Mapping[Any, Any], *, keep: bool = False) -> str | None:
        """What the parser says of a document over the settings so far; None where it takes it."""

        def parse() -> Namespace:
            resolved = names.resolve_document(document, COMMANDS)
            parsed: Namespace = self._parser.parse_object(resolved, namespace=self.config, _skip_required=True)
            return parsed

        return self._said(parse, keep=keep)

    def _said(self, parse: Callable[[], Namespace], *, keep: bool = False) -> str | None:
        """What parsing says against it; None, and the settings kept where asked for, when it says nothing."""
        before = self._parser.exit_on_error
        self._parser.exit_on_error = False
        try:
            parsed = parse()
        except (QratkError, ArgumentError, ValueError, TypeError, KeyError, AttributeError) as error:
            return str(error)
        finally:
            self._parser.exit_on_error = before
        if keep:
            self.config = parsed
        return None


def sources_of(arguments: Sequence[str]) -> list[Source]:
    """Sources of a command line, in order; raises what reading a file raises."""
    found: list[Source] = []
    waiting: str | None = None
    for argument in arguments:
        if waiting is not None and not argument.startswith("--"):
            found.append(_source(waiting, argument))
            waiting = None
        elif argument.startswith("--"):
            name, equals, value = argument.removeprefix("--").partition("=")
            waiting = None if equals else name
            if equals:
                found.append(_source(name, value))
    return found


def place_of(keys: Keys, sources: Sequence[Source]) -> str:
    """Where a setting, or what it stands in, was given last; empty where it is a default."""
    wanted = _without_frames(keys)
    known = [{_without_frames(at): place for at, place in source.places.items()} for source in reversed(sources)]
    for length in range(len(wanted), 0, -1):
        for places in known:
            if wanted[:length] in places:
                return places[wanted[:length]]
    return ""


def listed(mistakes: Sequence[Mistake], sources: Sequence[Source]) -> str:
    """One message of all mistakes, each with its place and its setting."""
    lines = [_line(mistake, place_of(mistake.keys, sources)) for mistake in mistakes]
    if len(lines) == 1:
        return lines[0]
    return "\n".join([f"{len(lines)} settings are wrong:", *(f"  {line}" for line in lines)])


def _null_components(source: Source) -> Iterator[Mistake]:
    """Mistakes of components of the search that are null, which a parser takes for not given, or calls no subclass."""
    section = source.document.get(names.SECTION)
    if not isinstance(section, Mapping):
        return
    for slot in (slot for slot in names.SLOTS if slot in section):
        default = RECIPE[slot]
        if section[slot] in _NULLS and isinstance(default, str):
            cure = f"leave it out for {default!r}"
            if "none" in REGISTRIES[names.SLOTS[slot]].names():
                cure = "'none' switches it off"
            yield Mistake((names.SECTION, slot), f"must be the name of a component, got null; {cure}")


def _without_frames(keys: Keys) -> Keys:
    """Keys as the command line has them: without those that hold the options of a class."""
    return tuple(key for key in keys if key != "init_args")


def _line(mistake: Mistake, place: str) -> str:
    name = ".".join(str(key) for key in mistake.keys if key not in _SPECIFICATION)
    if place == f"--{name}":
        return f"{place}: {mistake.text}"
    return ": ".join(part for part in (place, name, mistake.text) if part)


def _source(name: str, value: str) -> Source:
    return Source.of_file(Path(value)) if name == "config" else Source.of_argument(name, value)


def _lines(node: yaml.Node | None, keys: Keys) -> Iterator[tuple[Keys, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*keys, yaml.safe_load(key.value) if isinstance(key, yaml.ScalarNode) else str(key.value))
            yield inner, key.start_mark.line + 1
            yield from _lines(value, inner)


def _selected(document: Mapping[Any, Any], units: Sequence[Keys]) -> dict[Any, Any]:
    """The settings at some keys, each class with its path."""
    chosen: dict[Any, Any] = {}
    for keys in units:
        below, into = document, chosen
        for key in keys[:-1]:
            below = below[key]
            into = into.setdefault(key, {"class_path": below["class_path"]} if "class_path" in below else {})
        into[keys[-1]] = below[keys[-1]]
    return chosen


def _pruned(document: Mapping[Any, Any], keys: Keys, wrong: set[Keys]) -> dict[Any, Any]:
    kept: dict[Any, Any] = {}
    for key, value in document.items():
        inner = (*keys, key)
        if inner in wrong or (*inner, "class_path") in wrong:
            continue
        kept[key] = _pruned(value, inner, wrong) if isinstance(value, Mapping) else value
    return kept


def _leaves(document: Mapping[Any, Any], above: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """Settings that hold no others, with their keys as text: those of quantizers are numbers."""
    for key, value in document.items():
        keys = (*above, str(key))
        if isinstance(value, Mapping):
            yield from _leaves(value, keys)
        else:
            yield keys, value


def _at(document: Mapping[Any, Any], keys: Keys) -> Any:
    value: Any = document
    for key in keys:
        value = value[key]
    return value
