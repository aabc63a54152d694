"""Rows of instruction tuning as conversations: messages, which of them are learnt, and the tools that they may call."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qratk.data.sources import Row, shown

Message = Mapping[str, Any]
_ROLES = ("system", "developer", "user", "assistant", "tool")

INSTRUCTING = ("system", "developer")
"""Roles of who says how to answer: OpenAI's newer name and the older one. A chat template that knows no developer is
given the message as the system's (`ChatTemplate.known`)."""

TOLD = frozenset(("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "images", "audio"))
"""Fields of a message that are part of what it says, beside its content."""

_MASKS = ("train", "trainable", "training", "learn", "loss", "mask", "loss_mask")


@dataclass(frozen=True)
class Conversation:
    """Messages as the tokenizer's template takes them, and for each whether it is learnt.

    `fields` are (instruction, input) where the row is one question of that form, else nothing. A `joined` one is a text
    and its continuation, with nothing between them where no template says otherwise. `form` names that of the row.
    """

    fields: tuple[str, ...]
    messages: tuple[Message, ...]
    learnt: tuple[bool, ...]
    tools: tuple[Any, ...] = ()
    joined: bool = False
    form: str = ""

    def plain(self) -> Any:
        """What tells conversations apart, as JSON takes it."""
        turns = [(message["role"], message.get("content")) for message in self.messages]
        every = all(learnt == (role == "assistant") for (role, _), learnt in zip(turns, self.learnt, strict=True))
        joined = ("joined",) if self.joined else ()
        if every and not self.tools and all(set(message) == {"role", "content"} for message in self.messages):
            return self.fields, turns, *joined
        return self.fields, [dict(message) for message in self.messages], self.learnt, self.tools, *joined

    @property
    def turns(self) -> list[tuple[str, str]]:
        """(role, text) of each message."""
        return [(message["role"], message.get("content") or "") for message in self.messages]

    def told(self) -> list[str]:
        """What it says beside the texts: `tools`, and fields of messages."""
        named = sorted({name for message in self.messages for name in message if name in TOLD})
        return (["tools"] if self.tools else []) + named


def one_round(row: Row, question: str, answer: str, *, extra: str = "", joined: bool = False) -> Conversation:
    """A question, with what belongs to it, and its answer; behind the row's `system` and `history`."""
    asked = f"{question}\n\n{extra}" if extra.strip() else question
    before = [*_system(row), *_history(row)]
    turns = [*before, ("user", asked), ("assistant", answer)]
    return Conversation(
        () if before else (question, extra),
        tuple({"role": role, "content": text} for role, text in turns),
        tuple(role == "assistant" for role, _ in turns),
        _tools(row),
        joined and not before,
    )


def several_rounds(row: Row, given: Sequence[Any], *, seen: int = 0) -> Conversation:
    """The conversation of messages, behind the row's `system`; of the first `seen` messages none is learnt."""
    if not empty(row.data.get("history")):
        raise row.error("has a `history` beside messages; put all of it into these")
    messages = [_message(message, row) for message in given]
    learnt = [_learnt(message, row) for message in messages]
    for index, message in enumerate(messages[:seen]):
        if message.get("weight"):
            raise row.error("gives a message of its prompt a weight; only those of the completion are learnt")
        learnt[index] = False
    for _, text in _system(row):
        if messages[0]["role"] not in INSTRUCTING:
            messages.insert(0, {"role": "system", "content": text})
            learnt.insert(0, False)
        elif messages[0]["content"] != text:
            raise row.error("has a field 'system' beside another system message; remove one")
    if all(message["role"] != "assistant" for message in messages[seen:]):
        raise row.error("has no message of the assistant, so there is nothing to learn")
    if not any(learnt):
        raise row.error("gives every message of the assistant the weight 0, so there is nothing to learn")
    kept = tuple({name: value for name, value in message.items() if name != "weight"} for message in messages)
    return Conversation((), kept, tuple(learnt), _tools(row))


def listed(row: Row, name: str, *, of: str) -> Sequence[Any]:
    """The list of messages in a field. Raises DataError when it is none, or empty."""
    given = row.data.get(name)
    if not isinstance(given, list | tuple) or not given:
        raise row.error(f"needs `{name}`, a list of {of}; got {shown(given)}")
    return given


def _system(row: Row) -> list[tuple[str, str]]:
    text = row.text("system", default="")
    return [("system", text)] if text.strip() else []


def _history(row: Row) -> list[tuple[str, str]]:
    """Earlier rounds: pairs of question and answer."""
    history = row.data.get("history")
    if empty(history):
        return []
    if not isinstance(history, list | tuple) or not all(_is_pair(pair) for pair in history):
        raise row.error(f"needs `history` as a list of [question, answer]; got {shown(history)}")
    return [turn for asked, answered in history for turn in (("user", asked), ("assistant", answered))]


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(text, str) for text in value)


def _message(message: Any, row: Row) -> dict[str, Any]:
    """A message without its nulls, which stand for what is absent; but content may be null beside calls of tools.

    Content in parts, as OpenAI has it, is their texts one behind the other.
    """
    if not isinstance(message, Mapping) or message.get("role") not in _ROLES:
        raise row.error(f"has a message without a role of {', '.join(_ROLES)} and a text content: {shown(message)}")
    kept = {name: value for name, value in message.items() if value is not None or name == "content"}
    if isinstance(kept.get("content"), list | tuple):
        kept["content"] = _joined(kept["content"], row)
    content = kept.get("content")
    if not isinstance(content, str) and not (content is None and kept.get("tool_calls")):
        raise row.error(f"has a message without a role of {', '.join(_ROLES)} and a text content: {shown(message)}")
    for name in _MASKS:
        if name in kept:
            raise row.error(f"has a message with {name!r}; what is not to be learnt has the weight 0")
    return kept


def _joined(parts: Sequence[Any], row: Row) -> str:
    """The texts of parts {type: text, text: ...}. Raises DataError for parts of another kind, which are named."""
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text":
            raise row.error(
                f"has a message with a part of type {shown(kind)}; only parts of type 'text' can be learnt from"
                if kind is not None
                else f"has a message with a part that is no object with a `type`: {shown(part)}"
            )
        # Columns of files hold fields of other parts as nulls.
        others = [name for name in part if name not in ("type", "text") and not empty(part[name])]
        if not isinstance(part.get("text"), str) or others:
            raise row.error(f"has a part of type 'text' that is no {{type, text}}: {shown(part)}")
        texts.append(part["text"])
    return "".join(texts)


def _learnt(message: Message, row: Row) -> bool:
    weight: Any = message.get("weight")
    answer = bool(message["role"] == "assistant")
    if weight is None:
        return answer
    if weight not in (0, 1) or (weight and not answer):
        raise row.error(f"gives a message of the {message['role']} the weight {shown(weight)}; only the assistant's "
                        f"are learnt, with weight 1, or not, with weight 0")  # fmt: skip
    return bool(weight)


def _tools(row: Row) -> tuple[Any, ...]:
    """Tools, as a list or as its JSON text."""
    tools = row.data.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise row.error(f"needs `tools` as a list; its text is not valid JSON: {shown(tools)}") from error
    if empty(tools):
        return ()
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise row.error(f"needs `tools` as a list of objects; got {shown(tools)}")
    return tuple(tools)


def empty(value: Any) -> bool:
    """Whether a field says nothing: null, a blank text, or nothing in a list."""
    return value is None or (isinstance(value, str) and not value.strip()) or value in ([], (), {})
