"""jsonargparse's errors in the words of a user, with what would be right."""

from __future__ import annotations

import re
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
