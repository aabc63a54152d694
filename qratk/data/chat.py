"""Conversations through a tokenizer's chat template: its very text, and where in it the answers stand.

A template may change an answer, drop parts of earlier ones or put something before them. So the text is what the
template makes of the whole conversation, and answers are found by rendering it again with marks in their places.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from qratk.core.errors import DataError
from qratk.data.conversation import TOLD, Conversation, Message

Span = tuple[int, int]

_MARK = "@@answer-{}-mark@@"
_PROBE = [{"role": "user", "content": "a"}]


class ChatTemplate:
    """A tokenizer's chat template."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def known(self, conversation: Conversation) -> Conversation:
        """The conversation with the developer's messages as the system's where the template does not know that role,
        as templates of its kind had the system's before there was a developer."""
        if self._names("developer") or all(role != "developer" for role, _ in conversation.turns):
            return conversation
        told = [{**m, "role": "system"} if m["role"] == "developer" else m for m in conversation.messages]
        return replace(conversation, messages=tuple(told))

    def text(self, conversation: Conversation, where: str) -> str:
        """What the template renders. Raises DataError when it rejects the conversation or leaves out what it says."""
        messages, tools = conversation.messages, conversation.tools
        text = self._render(messages, tools, where)
        for name in self._lost(conversation, text, where):
            raise DataError(f"{where}: the chat template leaves out {name!r}; remove it, or use a template that has it")
        return text

    def spans(self, conversation: Conversation, text: str, where: str) -> list[Span]:
        """Where in the text each message that is learnt stands, with what the template puts before it and the model has
        to generate. Raises DataError when that cannot be told."""
        answers = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        found = self._all_at_once(conversation, answers, text)
        if found is None:
            found = {i: self._one(conversation, i, text, where) for i in answers if conversation.learnt[i]}
        return [found[i] for i in answers if conversation.learnt[i]]

    def asks_as_learnt(self, text: str, spans: Sequence[Span]) -> bool:
        """Whether the last answer stands behind what the template puts before an answer that is to be generated."""
        return not spans or text[: spans[-1][0]].endswith(self.generation_prompt)

    def require_reasoning(self, conversation: Conversation, text: str, spans: Sequence[Span], where: str) -> None:
        """Raise DataError where the last answer is learnt without the think block in it: a template may drop those of
        earlier answers, which the model will not see either, but what it has to generate is the last one."""
        answers = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        content = conversation.messages[answers[-1]].get("content") or ""
        reasoning, found, _ = content.rpartition("</think>")
        thought = reasoning.rpartition("<think>")[2].strip()
        if found and thought and conversation.learnt[answers[-1]] and thought not in text[slice(*spans[-1])]:
            raise DataError(
                f"{where}: the chat template drops the think block of the last answer, so that the model would learn "
                f"to answer without; use template alpaca or plain, a tokenizer with another template, or take it out"
            )

    def ignored(self, conversation: Conversation) -> Iterator[str]:
        """Fields of messages that the template does not know and that say nothing."""
        for message in conversation.messages:
            yield from (name for name in message if name not in TOLD and not self._names(name))

    def _names(self, name: str) -> bool:
        return re.search(rf"\b{re.escape(name)}\b", self._source) is not None

    @cached_property
    def _source(self) -> str:
        template = self._tokenizer.chat_template
        return "\n".join(template.values()) if isinstance(template, Mapping) else str(template)

    @cached_property
    def generation_prompt(self) -> str:
        """What the template puts before an answer that is to be generated; nothing where that cannot be told."""
        try:
            without = self._apply(_PROBE, (), add_generation_prompt=False)
            asked = self._apply(_PROBE, (), add_generation_prompt=True)
        except Exception:  # a template that wants other messages
            return ""
        return asked.removeprefix(without) if asked.startswith(without) else ""

    def _apply(self, messages: Sequence[Message], tools: Sequence[Any], *, add_generation_prompt: bool = False) -> str:
        text: str = self._tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=list(tools) or None,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
        return text

    def _render(self, messages: Sequence[Message], tools: Sequence[Any], where: str) -> str:
        try:
            return self._apply(messages, tools)
        except Exception as error:  # templates raise on purpose: wrong order of roles, no system message allowed
            raise DataError(f"{where}: the chat template rejects the messages: {error}") from error

    def _lost(self, conversation: Conversation, text: str, where: str) -> Iterator[str]:
        """What the conversation says beside its texts and the template has no place for."""
        for name in conversation.told():
            # Reasoning of earlier turns may be left out on purpose; calls and tools never.
            on_purpose = name not in ("tools", "tool_calls") and self._names(name)
            if not on_purpose and self._without(conversation, name) == text:
                yield name

    def _without(self, conversation: Conversation, name: str) -> str | None:
        """The text without a field, or None where the template does not render that."""
        messages = [{key: value for key, value in m.items() if key != name} for m in conversation.messages]
        try:
            return self._apply(messages, () if name == "tools" else conversation.tools)
        except Exception:  # it needs the field
            return None

    def _all_at_once(self, conversation: Conversation, answers: Sequence[int], text: str) -> dict[int, Span] | None:
        """Spans where the template does nothing to answers but insert them, as most do; None for another one."""
        if conversation.told():
            return None
        messages = list(conversation.messages)
        for i in answers:
            messages[i] = {**messages[i], "content": _MARK.format(i)}
        try:
            rest = self._apply(messages, conversation.tools)
        except Exception:  # a template that looks into answers
            return None
        spans: dict[int, Span] = {}
        position = floor = 0
        for i in answers:
            before, found, rest = rest.partition(_MARK.format(i))
            position += len(before)
            following = rest.partition(_MARK.format(min((j for j in answers if j > i), default=i)))[0]
            shown = _inserted(conversation.messages[i]["content"], text, position, following)
            if not found or not text.startswith(before, position - len(before)) or shown is None:
                return None
            begin = self._begun(text, position, conversation.messages[:i], floor=floor)
            spans[i] = begin, position + shown
            position = floor = position + shown
        return spans if text[position:] == rest else None

    def _one(self, conversation: Conversation, index: int, text: str, where: str) -> Span:
        """Span of one answer: what of the text is not as when a mark stands in its place."""
        for marked in _marked(conversation.messages[index]):
            messages = [*conversation.messages[:index], marked, *conversation.messages[index + 1 :]]
            try:
                other = self._apply(messages, conversation.tools)
            except Exception:  # a template that looks into answers: try another mark
                continue
            head, found, tail = other.partition(_MARK.format(0))
            begin = self._begun(head, len(head), conversation.messages[:index])
            stop = len(text) - len(tail)
            known = text.startswith(head[:begin]) and text.endswith(tail) and begin <= stop
            if found and _MARK.format(0) not in tail and known:
                return begin, stop
        raise DataError(
            f"{where}: the chat template drops an answer, or changes it so that it cannot be found; use template "
            f"alpaca or plain"
        )

    def _begun(self, text: str, position: int, before: Sequence[Message], *, floor: int = 0) -> int:
        """Where generation of the answer at a position began: behind the generation prompt, unless that is an earlier
        answer's, with the message before this one behind it."""
        prompt = self.generation_prompt
        at = text.rfind(prompt, floor, position) if prompt else -1
        if at < 0:
            return position
        last = (before[-1].get("content") or "").strip() if before else ""
        behind = last in text[at + len(prompt) : position] and last not in text[floor:at]
        return position if last and behind else at + len(prompt)


def _inserted(answer: str, text: str, position: int, following: str) -> int | None:
    """Characters that an answer takes at a position, whole or stripped, before what must follow; None if not there."""
    forms: tuple[Callable[[str], str], ...] = (str, str.strip, str.rstrip, str.lstrip)
    for form in forms:
        if text.startswith(form(answer) + following, position):
            return len(form(answer))
    return None


def _marked(message: Message) -> Iterator[Message]:
    """An answer with a mark: alone, in the place of its content, in the place of what it calls."""
    mark = _MARK.format(0)
    yield {"role": message["role"], "content": mark}
    yield {**message, "content": mark}
    calls = message.get("tool_calls")
    if isinstance(calls, list | tuple) and calls and isinstance(calls[0], Mapping):
        function = calls[0].get("function")
        called = {**function, "name": mark} if isinstance(function, Mapping) else mark
        yield {**message, "tool_calls": [{**calls[0], "function": called}]}
