"""jsonargparse's errors in the words of a user, with what would be right."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Sequence
from typing import Final

from qratk.core.text import nearest
from qratk.settings import names

_NOISE: Final = re.compile(r"Expected a path but|Subtypes: \[|Expected a <class 'NoneType'>|Given value type:")


def explained(message: str, settings: Sequence[str] = ()) -> str:
    """jsonargparse's message without what only a programmer reads, and with what would be right.

    `settings` are the names of all settings.
    """
    lines = [line.rstrip() for line in message.splitlines() if line.strip() and not _NOISE.search(line)]
    text = "\n".join(lines)
    text = re.sub(r"Expected a typing\.Literal\[(.*?)\]", r"Expected one of \1", text)
    text = re.sub(r"<class '(?:collections\.abc\.)?(\w+)'>", lambda m: {"Sequence": "list"}.get(m[1], m[1]), text)
    text = re.sub(r"collections\.abc\.Sequence\[", "list[", text)
    if match := re.search(r"class_path '([\w.]+)':\s*Option '(\w+)' is not accepted", text):
        return text + names.option_hint(match[1], match[2])
    if match := re.search(r"unrecognized arguments: --([\w.]+)", text):
        return text + nearest(match[1], settings)
    if match := re.search(r"does not accept option '([\w.]+)'", text):
        return text + nearest(match[1], settings)
    if match := re.search(r'key "data".*Expected a dot import path string: (\w+)', text, re.S):
        known = list(names.DATA_CLASSES)
        return f"data: unknown name {match[1]!r}; known are {', '.join(known)}" + nearest(match[1], known)
    return re.sub(r"(arguments are required: )(?:\w+\.)(\w+)", r"\1--\2", text)


def shortened(message: str, keys: Sequence[object], settings: Sequence[str] = ()) -> str:
    """jsonargparse's message of one setting, which is told beside it, on one line."""
    lines = [line.strip().removeprefix("- ") for line in explained(message, settings).splitlines()]
    if _UNKNOWN.search(message) and "class_path '" not in message:
        return "unknown setting" + nearest(".".join(map(str, keys)), settings)
    if match := _NO_SETTINGS.search(message):
        return f"must hold settings by name, or name a file that does, got {match[1]}"
    if match := _OPTION.search(message):
        text = f"option {match[2]!r} is not accepted"
        return text + (names.option_hint(match[1], match[2]) or _class_hint(match[1], match[2]))
    told = [line for line in lines if not _FRAME.match(line)] or lines
    text = " ".join(told)
    text = re.sub(r"^Expected an? (?=[aeiou])", "Expected an ", text)
    return text[:1].lower() + text[1:] if text.startswith("Expected") else text


def _class_hint(class_path: str, given: str) -> str:
    """The options of a class that no registry names, as the end of an error message."""
    module, _, name = class_path.rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    if found is None:
        return ""
    known = [option for option in inspect.signature(found).parameters if option not in ("args", "kwargs")]
    return f"; the options of {name} are {', '.join(known)}" + nearest(given, known)


_UNKNOWN: Final = re.compile(r"does not accept option|unrecognized arguments|Option '[^']*' is not accepted")
_OPTION: Final = re.compile(r"class_path '([\w.]+)':\s*Option '(\w+)' is not accepted")
_NO_SETTINGS: Final = re.compile(r"Unable to load config ('.*')")
_FRAME: Final = re.compile(
    r"Parser key \"|Problem with given class_path|Does not validate against any|Errors:$|Given value:|Group '"
)
