"""Settings from text: YAML in which a pair such as 4:8 stays text, and no setting is given twice."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any, Final

import yaml

from qratk.core.errors import ConfigurationError

SECTIONS: Final = ("trainer", "model", "search", "lm_eval")
"""Sections that hold settings by name; `data` may be a bare name."""

_INTEGER: Final = re.compile(r"[-+]?(?:0b[01_]+|0[0-7_]*|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$")
_FLOAT: Final = re.compile(
    r"(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|\.[0-9_]+(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_REPLACED: Final = tuple(f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp"))


class SettingsLoader(yaml.SafeLoader):
    """YAML 1.1 without numbers to the base of 60, to which 4:8 is 248, without dates, and with 1e-4 as a number.

    A key that a mapping has twice raises `yaml.YAMLError`: the first value would be dropped.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {  # noqa: RUF012 (as PyYAML declares it)
        first: [(tag, pattern) for tag, pattern in known if tag not in _REPLACED]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """A mapping; each of its keys is there once."""
        for first, again in _repeated(node):
            raise yaml.constructor.ConstructorError(
                "in settings", first.start_mark, f"{again.value!r} is given twice", again.start_mark
            )
        return super().construct_mapping(node, deep=deep)


SettingsLoader.add_implicit_resolver("tag:yaml.org,2002:int", _INTEGER, list("-+0123456789"))
SettingsLoader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def load(text: str) -> Any:
    """Plain data of YAML, the value of an argument or a whole file; raises `yaml.YAMLError`.

    Words that YAML takes for keys without values, such as "a:" or "{a, b}", stay text.
    """
    value = yaml.load(text, Loader=SettingsLoader)
    if isinstance(value, dict) and value and all(item is None for item in value.values()):
        words = set(text.strip(" {}").replace(" ", "").split(","))
        if text.strip() in {f"{key}:" for key in value} or words == set(value):
            return text
    return value


def read_settings(path: Path) -> dict[str, Any]:
    """Settings of a file; raises `ConfigurationError` that names the file and, where there is one, the line."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
        root = yaml.compose(text, Loader=SettingsLoader)
        document = yaml.load(text, Loader=SettingsLoader)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigurationError(f"{path}:{line} is not UTF-8; save the file in that encoding") from None
    except yaml.YAMLError as error:
        raise ConfigurationError(_told(path, error)) from None
    except RecursionError:
        raise ConfigurationError(f"{path} is nested too deeply to be read") from None
    if root is None:
        raise ConfigurationError(f"{path} is empty; it must hold settings by name, as in 'search: {{...}}'")
    if not isinstance(root, yaml.MappingNode):
        raise ConfigurationError(f"{path} must hold settings by name, as in 'search: {{...}}'")
    for mark, text in _mistakes(root):
        raise ConfigurationError(f"{path}:{mark.line + 1}: {text}")
    found: dict[str, Any] = document
    return found


def _told(path: Path, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    place = path if mark is None else f"{path}:{mark.line + 1}"
    problem = getattr(error, "problem", None) or " ".join(str(error).split())
    if "given twice" in problem:
        first = error.context_mark.line + 1  # type: ignore[attr-defined]
        return f"{place}: {problem}, first in line {first}; join the two, or remove one"
    return f"{place} is no YAML: {problem}"


def _repeated(node: yaml.MappingNode) -> Iterator[tuple[yaml.Node, yaml.Node]]:
    seen: dict[tuple[str, Any], yaml.Node] = {}
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            if (key.tag, key.value) in seen:
                yield seen[key.tag, key.value], key
            seen[key.tag, key.value] = key


def _mistakes(root: yaml.MappingNode) -> Iterator[tuple[yaml.Mark, str]]:
    """What no command can take: sections that hold no settings by name, and classes without a name."""
    for key, value in root.value:
        is_null = isinstance(value, yaml.ScalarNode) and value.tag.endswith(":null")
        if key.value in SECTIONS and not isinstance(value, yaml.MappingNode) and not is_null:
            yield key.start_mark, f"'{key.value}' must hold settings by name, as in '{key.value}: {{...}}'"
    yield from _nameless(root)


def _nameless(node: yaml.Node) -> Iterator[tuple[yaml.Mark, str]]:
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _nameless(item)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value == "class_path" and (not isinstance(value, yaml.ScalarNode) or _is_no_text(value)):
                yield key.start_mark, "'class_path' must be a name or an import path"
            yield from _nameless(value)


def _is_no_text(node: yaml.ScalarNode) -> bool:
    return not node.value.strip() or node.tag != "tag:yaml.org,2002:str"
