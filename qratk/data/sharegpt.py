"""Turns of ShareGPT, from and value, as messages of role and content."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from qratk.data.conversation import empty
from qratk.data.sources import Row, shown

CALLS: Final = frozenset(("function_call", "tool_call"))
"""Who says what the assistant calls, as JSON of {"name": ..., "arguments": ...} or a list of them."""

ROLES: Final[Mapping[str, str]] = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bing", "bard"), "assistant"),
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("tool", "observation", "function", "function_response", "tool_response"), "tool"),
    **dict.fromkeys(CALLS, "assistant"),
}
"""Role of each speaker that public data sets have."""


def messages(row: Row, turns: Sequence[Any]) -> list[dict[str, Any]]:
    """Messages of turns, which say {from, value}, or {role, content}. Raises DataError."""
    return [_message(row, turn) for turn in turns]


def _message(row: Row, turn: Any) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise row.error(f"has a turn that is no object of `from` and `value`: {shown(turn)}")
    pairs = [("from", "value"), ("role", "content")]
    speaker, text = pairs[0] if not empty(turn.get("from")) else pairs[1]
    said, role = turn.get(text), ROLES.get(str(turn.get(speaker)).lower())
    if role is None:
        raise row.error(f"has a turn from {shown(turn.get(speaker))}; known speakers are {', '.join(ROLES)}")
    rest = {name: value for name, value in turn.items() if not any(name in pair for pair in pairs)}
    if str(turn[speaker]).lower() in CALLS:
        return {"role": role, "content": "", "tool_calls": _calls(row, said), **rest}
    in_parts = text == "content" and isinstance(said, list | tuple)
    if not isinstance(said, str) and not in_parts and not (said is None and rest.get("tool_calls")):
        raise row.error(f"has a turn without a text {text!r}: {shown(turn)}")
    return {"role": role, "content": said, **rest}


def _calls(row: Row, said: Any) -> list[dict[str, Any]]:
    """Calls of tools from their JSON text."""
    try:
        calls = json.loads(said) if isinstance(said, str) else said
    except (ValueError, RecursionError):
        calls = None
    calls = [calls] if isinstance(calls, Mapping) else calls
    named = isinstance(calls, list) and all(isinstance(c, Mapping) and isinstance(c.get("name"), str) for c in calls)
    if not calls or not named:
        raise row.error(f'has a call of a tool that is no JSON of {{"name": ..., "arguments": ...}}: {shown(said)}')
    return [{"type": "function", "function": dict(call)} for call in calls]
