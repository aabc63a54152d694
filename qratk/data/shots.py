"""Examples before a conversation: earlier turns where a chat template puts it into words, text where none does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from qratk.core.errors import DataError
from qratk.data.answers import Piece
from qratk.data.conversation import INSTRUCTING, Conversation
from qratk.data.splits import Item
from qratk.data.task import ShotStyle


@dataclass(frozen=True)
class Shots:
    """Conversations that are shown before others, and how."""

    examples: tuple[Conversation, ...]
    style: ShotStyle

    @classmethod
    def of(cls, examples: Sequence[Item], style: ShotStyle) -> Shots:
        """Examples of rows. Raises DataError for one that cannot stand before another conversation."""
        for item in examples:
            content: Conversation = item.content
            if content.tools or any(role in INSTRUCTING for role, _ in content.turns):
                raise DataError(
                    f"{item.where}: a row with tools or a message of the system cannot be shown before another one; "
                    f"give other `examples`"
                )
        return cls(tuple(item.content for item in examples), style)


def as_turns(item: Item) -> Conversation:
    """The conversation of an item behind its examples, of which nothing is learnt; the description is the system's."""
    content: Conversation = item.content
    shots: Shots | None = item.before
    if shots is None:
        return content
    before = [message for example in shots.examples for message in example.messages]
    first = list(content.messages)
    system = [first.pop(0)] if first and first[0]["role"] in INSTRUCTING else []
    if shots.style.description:
        if system:
            raise DataError(f"{item.where}: the row has a message of the system beside `description`; leave that out")
        system = [{"role": "system", "content": shots.style.description}]
    messages = (*system, *before, *first)
    learnt = (False,) * (len(messages) - len(first)) + content.learnt[len(content.learnt) - len(first) :]
    return replace(content, fields=(), messages=messages, learnt=learnt, joined=False)


def as_text(item: Item, pieces_of: Callable[[Conversation, str], Sequence[Piece]]) -> list[Piece]:
    """Pieces of an item's conversation behind the text of its examples, each with the delimiter behind it."""
    pieces = list(pieces_of(item.content, item.where))
    shots: Shots | None = item.before
    if shots is None:
        return pieces
    shown = ["".join(text for text, _ in pieces_of(example, item.where)) for example in shots.examples]
    before = shots.style.description + "".join(text + shots.style.delimiter for text in shown)
    return [(before, False), *pieces] if before else pieces
