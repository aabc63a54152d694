"""Names of components: what users write, and what is saved of a run.

jsonargparse resolves classes by import path, or by class name once their module is imported. Our registries know more:
third-party names, and errors that list what is known. So names become import paths before jsonargparse sees them, here
and nowhere else: in files through a loader (`resolve_document`), on the command line through `resolve_arguments`. What
is saved goes the other way (`named_document`): a file may move, a name does not. Import paths of files of before are
read by package and class name, wherever the class is defined by now.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import yaml

from qratk.components import REGISTRIES
from qratk.core.errors import PluginError
from qratk.core.text import nearest
from qratk.quantizers.sets import QUANTIZER_SETS, quantizer_set
from qratk.settings.reading import load

SECTION: Final = "search"
DATA: Final = "data"
QUANTIZERS: Final = "quantizers"
ADAPTER: Final = "adapter"
FOR, CLIENT = "for", "client"  # a setting of a search whose name is a word of Python's

SLOTS: Final[Mapping[str, str]] = {
    "searcher": "searchers",
    "refiner": "refiners",
    "surrogate": "surrogates",
    "mutations": "mutations",
    "repair": "repairs",
    "bits_importance": "estimators",
    "rank_importance": "estimators",
    "evaluator": "evaluators",
    "executor": "executors",
    "reporters": "reporters",
}
"""Which open set each component of a search comes from."""

DATA_CLASSES: Final[Mapping[str, str]] = {
    "InstructionData": "qratk.data.instruction.InstructionData",
    "MultipleChoiceData": "qratk.data.multiple_choice.MultipleChoiceData",
    "TextData": "qratk.data.text.TextData",
    "SuiteData": "qratk.data.suite.SuiteData",
    "LmEvalData": "qratk.data.lm_eval_data.LmEvalData",
    "EmbeddedData": "qratk.embedded.datamodule.EmbeddedData",
}
"""Import path of each data module that goes by its class name."""

_ARGUMENT = re.compile(
    r"--(?:(?P<data>data)(?:\.class_path|\.help)?|search(?:\.(?P<slot>\w+)(?:\.class_path|\.help|\+)?)?|"
    r"model\.(?P<model>adapter|quantizers))"
    r"(?:=(?P<value>.*))?",
    re.S,
)


Convert = Callable[[str, str], str]


def class_path(kind: str, given: str) -> str:
    """Import path of what is given as a name or as an import path, of today's file or of a former one.

    `kind` is that of a registry, or "data". The import path of a user's own class stays. Raises
    `UnknownComponentError` or `PluginError`.
    """
    name = registered_name(kind, given)
    if kind == DATA:
        return DATA_CLASSES.get(name, name)
    return name if "." in name else REGISTRIES[kind].class_path(name)


def registered_name(kind: str, given: str) -> str:
    """The name that stands for what is given as a name or as an import path; a path without a name stays."""
    if "." not in given:
        return given
    if kind == DATA:
        package, name = given.partition(".")[0], given.rpartition(".")[2]
        return name if package == "qratk" and name in DATA_CLASSES else given
    return REGISTRIES[kind].name_of(given) or given


def resolve_component(kind: str, given: Any, convert: Convert = class_path) -> Any:
    """A component with its name replaced by an import path; lists are resolved item by item.

    Takes a name, `{class_path: name, init_args: {...}}` or a list of these. Whatever else is given stays as it is, for
    jsonargparse to judge. Raises `UnknownComponentError` or `PluginError`.
    """
    if isinstance(given, str):
        return convert(kind, given)
    if isinstance(given, list | tuple):
        return [resolve_component(kind, item, convert) for item in given]
    if not isinstance(given, Mapping):
        return given
    if isinstance(given.get("class_path"), str):
        inner = {key: _relocated(value) for key, value in given.items() if key != "class_path"}
        inner = _members(inner, convert) if kind == DATA else inner
        return {"class_path": convert(kind, given["class_path"]), **inner}
    return _members(given, convert) if kind == DATA else given


def _members(value: Any, convert: Convert) -> Any:
    """Options of a data module, in which those of others stand under `data`."""
    if isinstance(value, list | tuple):
        return [_members(item, convert) for item in value]
    if not isinstance(value, Mapping):
        return value
    return {
        key: resolve_component(DATA, item, convert) if key == DATA else _members(item, convert)
        for key, item in value.items()
    }


def resolve_section(section: Any, convert: Convert = class_path) -> Any:
    """The search section with every component resolved, and `for` under the name that Python can give it.

    In files (`convert` to registered names) it is `for` again.
    """
    if not isinstance(section, Mapping):
        return section
    renamed = {CLIENT: FOR} if convert is registered_name else {FOR: CLIENT}
    return {
        renamed.get(key, key): resolve_component(SLOTS[key], value, convert) if key in SLOTS else value
        for key, value in section.items()
    }


def resolve_document(document: Any, commands: Sequence[str] = ()) -> Any:
    """A whole configuration with import paths in place of names, also below the names of commands."""
    return _converted(document, commands, class_path)


def named_document(document: Any, commands: Sequence[str] = ()) -> Any:
    """A whole configuration with names in place of import paths, as files keep it: no move of a file breaks them.

    Classes that no registry names, such as a user's own, stay import paths.
    """
    return _converted(document, commands, registered_name)


def _converted(document: Any, commands: Sequence[str], convert: Convert) -> Any:
    if not isinstance(document, Mapping):
        return document
    if any(key in commands and isinstance(value, Mapping) and SECTION in value for key, value in document.items()):
        return {key: _converted(value, (), convert) if key in commands else value for key, value in document.items()}
    return {key: _converted_part(key, value, convert) for key, value in document.items()}


def _converted_part(key: str, value: Any, convert: Convert) -> Any:
    if key == SECTION:
        return resolve_section(value, convert)
    if key == DATA:
        return resolve_component(DATA, value, convert)
    if key == "model" and isinstance(value, Mapping):
        return {name: _of_model(name, part, convert) for name, part in value.items()}
    return _relocated(value)


def _of_model(key: str, value: Any, convert: Convert) -> Any:
    """An option of the module, which takes names itself, so that names they are for the parser too.

    The parser would take {class_path, init_args} for a class to build, and fails where two say another: an adapter is
    {name: options} for it.
    """
    if key == QUANTIZERS and isinstance(value, str) and value in QUANTIZER_SETS:
        return quantizer_set(value)  # what it stands for is saved, so that a run keeps it
    if key == QUANTIZERS and isinstance(value, Mapping):
        return {bits: resolve_component(QUANTIZERS, one, registered_name) for bits, one in value.items()}
    if key == ADAPTER and isinstance(value, Mapping):
        return _adapter(value, for_files=convert is registered_name)
    return _relocated(value)


def _adapter(given: Mapping[str, Any], *, for_files: bool) -> Mapping[str, Any]:
    """An adapter with options as {class_path, init_args} in files, and as {name: options} for the parser."""
    if set(given) <= {"class_path", "init_args"} and isinstance(given.get("class_path"), str):
        name, options = registered_name("adapters", given["class_path"]), given.get("init_args")
    elif len(given) == 1 and isinstance(next(iter(given)), str):
        ((name, options),) = given.items()
    else:
        return given
    options = {} if options is None else options
    return {"class_path": name, "init_args": options} if for_files else {name: options}


def _relocated(value: Any) -> Any:
    """Plain data in which the import paths of the project's components lead to the files of today."""
    if isinstance(value, list | tuple):
        return [_relocated(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    moved = {key: _relocated(item) for key, item in value.items()}
    path = moved.get("class_path")
    if isinstance(path, str) and path.startswith("qratk."):
        kind = path.split(".")[1]
        moved["class_path"] = class_path(kind, path) if kind in {*REGISTRIES, DATA} else path
    return moved


def resolve_arguments(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments with the names in `--search.<component>` and `--data` resolved, inline or in a file."""
    resolved: list[str] = []
    waiting: str | None = None  # the slot whose value is the next argument
    for argument in map(_client_argument, arguments):
        if waiting is not None:
            resolved.append(argument if argument.startswith("--") else _resolve_text(waiting, argument))
            waiting = None
            continue
        match = _ARGUMENT.fullmatch(argument)
        slot = None if match is None else (match["data"] or match["slot"] or match["model"] or SECTION)
        if match is None or slot not in {*SLOTS, SECTION, DATA, ADAPTER, QUANTIZERS}:
            resolved.append(argument)
        elif match["value"] is None:
            waiting = slot
            resolved.append(argument)
        else:
            resolved.append(argument[: match.start("value")] + _resolve_text(slot, match["value"]))
    return resolved


def _client_argument(argument: str) -> str:
    """The argument, with `--search.for` under the name that Python can give it."""
    name, equals, value = argument.partition("=")
    return f"--{SECTION}.{CLIENT}{equals}{value}" if name == f"--{SECTION}.{FOR}" else argument


def option_hint(class_path: str, given: str) -> str:
    """What options the component with an import path has, as the end of an error message."""
    for registry in REGISTRIES.values():
        for name in registry.names():
            with suppress(PluginError):
                if registry.class_path(name) == class_path:
                    known = [option.name for option in registry.options(name)]
                    return f"; the options of {name!r} are {', '.join(known) or 'none'}" + nearest(given, known)
    return ""


def _resolve_text(slot: str, text: str) -> str:
    path = Path(text)
    try:
        is_file = path.suffix in {".yaml", ".yml", ".json"} and path.is_file()
        value = load(path.read_text(encoding="utf-8") if is_file else text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return text  # jsonargparse says what is wrong with it
    if slot == SECTION:
        resolved = resolve_section(value)
    elif slot in (ADAPTER, QUANTIZERS):
        resolved = _of_model(slot, value, class_path)
    else:
        resolved = resolve_component(SLOTS.get(slot, slot), value)
    if resolved == value and not is_file:
        return text
    return resolved if isinstance(resolved, str) else json.dumps(resolved)
