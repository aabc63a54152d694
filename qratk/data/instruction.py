"""Instruction tuning: prompts and answers, where only answers are learnt and scored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from qratk.core.errors import DataError
from qratk.data.base import TaskData
from qratk.data.encoding import Encoded, encode_pieces, encoded, special_ids
from qratk.data.scoring import LikelihoodScorer
from qratk.data.sources import Row
from qratk.data.splits import Item, Split
from qratk.data.text import scored_tokens

TemplateName = Literal["auto", "alpaca", "chat", "plain"]
Piece = tuple[str, bool]
Turn = tuple[str, str]
_ROLES = ("system", "user", "assistant", "tool")

ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_NO_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


class InstructionData(TaskData):
    """Rows of instruction, input and output, or of messages; the score is minus nats per answer token.

    Args:
        train: As in `TaskData`, whose other options apply too.
        template: `chat` is the tokenizer's own template, `alpaca` the prompt of Stanford Alpaca, `plain` the bare texts
            with line breaks between them; `auto` is `chat` where the tokenizer has a template, else `alpaca`.
    """

    def __init__(self, train: str | list[str] | None = None, *, template: TemplateName = "auto", **kwargs: Any) -> None:
        super().__init__(train, **kwargs)
        if template not in ("auto", "alpaca", "chat", "plain"):
            raise DataError(f"template must be auto, alpaca, chat or plain, got {template!r}")
        self.template = template

    def options(self) -> Mapping[str, Any]:
        """The template."""
        return {"template": self.template}

    def parse(self, row: Row) -> tuple[tuple[str, ...], tuple[Turn, ...]]:
        """(instruction, input) or nothing, and the turns of the conversation, each (role, text)."""
        if "messages" in row.data:
            return (), _turns(row)
        instruction, extra = row.text("instruction"), row.text("input", default="")
        question = f"{instruction}\n\n{extra}" if extra.strip() else instruction
        return (instruction, extra), (("user", question), ("assistant", row.text("output")))

    def fields_used(self) -> frozenset[str]:
        """Those of both forms of rows."""
        return frozenset(("instruction", "input", "output", "messages"))

    @property
    def template_in_use(self) -> Literal["alpaca", "chat", "plain"]:
        """What `auto` comes to. Raises DataError when a chat template is asked for and there is none."""
        has_chat = bool(getattr(self.tokenizer, "chat_template", None))
        if self.template == "chat" and not has_chat:
            raise DataError("template is chat, but the tokenizer has no chat template: use alpaca, plain or auto")
        if self.template == "auto":
            return "chat" if has_chat else "alpaca"
        return self.template

    def pieces(self, item: Item) -> list[Piece]:
        """Text of an item in pieces, each with whether it is an answer."""
        fields, turns = item.content
        match self.template_in_use:
            case "chat":
                return _chat_pieces(self.tokenizer, turns, item.where)
            case "alpaca":
                return _alpaca_pieces(fields, turns)
            case _:
                return _plain_pieces(turns)

    def _encode(self, items: Sequence[Item]) -> Iterator[Encoded]:
        chat = self.template_in_use == "chat"
        closing = special_ids(self.tokenizer) if chat else frozenset()
        for index, item in enumerate(items):
            pieces = self.pieces(item)
            ids, owners = encode_pieces(self.tokenizer, pieces, special=not chat)
            tokens, labelled = _close_answers(ids, owners, pieces, closing, self.tokenizer.eos_token_id)
            yield self._fit(tokens, labelled, index)

    def _fit(self, tokens: list[int], labelled: list[bool], item: int) -> Encoded:
        """The stretch of `max_length` tokens with the most answer in it, the earliest if several; a leading
        beginning-of-sequence token stays in front."""
        limit = self.max_length
        if len(tokens) <= limit:
            return encoded(tokens, labelled, item=item)
        keep = 1 if tokens[0] == self.tokenizer.bos_token_id and limit > 2 else 0
        first = _richest_stretch(labelled[keep:], limit - keep, counts_first=bool(keep)) + keep
        cut = slice(first, first + limit - keep)
        return encoded(tokens[:keep] + tokens[cut], labelled[:keep] + labelled[cut], truncated=True, item=item)

    def encode_training(self, items: Sequence[Item]) -> Iterator[Encoded]:
        """One row an item."""
        return self._encode(items)

    def encode_scoring(self, items: Sequence[Item]) -> Iterator[Encoded]:
        """One row an item. Raises DataError when an answer has nothing to score."""
        for row in self._encode(items):
            if not row.labelled[1:].any():
                raise DataError(f"{items[row.item].where}: there is no answer to score; remove the row")
            yield row

    def scorer(self, split: Split = "validation") -> LikelihoodScorer:
        """Scorer of nats per answer token."""
        return LikelihoodScorer([row.item for row in self.scoring_rows(split)], len(self.items(split)))

    def item_weights(self, stage: Split = "validation") -> tuple[float, ...]:
        """Answer tokens of each item."""
        return scored_tokens(self.scoring_rows(stage), len(self.items(stage)))


def _turns(row: Row) -> tuple[Turn, ...]:
    messages = row.data["messages"]
    if not isinstance(messages, list | tuple) or not messages:
        raise row.error(f"needs `messages`, a list of {{role, content}}; got {messages!r:.80}")
    turns = tuple(_turn(message, row) for message in messages)
    if all(role != "assistant" for role, _ in turns):
        raise row.error("has no message of the assistant, so there is nothing to learn")
    return turns


def _turn(message: Any, row: Row) -> Turn:
    role = message.get("role") if isinstance(message, Mapping) else None
    content = message.get("content") if isinstance(message, Mapping) else None
    if role not in _ROLES or not isinstance(content, str):
        raise row.error(f"has a message without a role of {', '.join(_ROLES)} and a text content: {message!r:.120}")
    return role, content


def _alpaca_prompt(instruction: str, extra: str = "") -> str:
    if extra.strip():
        return ALPACA_INPUT.format(instruction=instruction, input=extra)
    return ALPACA_NO_INPUT.format(instruction=instruction)


def _alpaca_pieces(fields: tuple[str, ...], turns: Sequence[Turn]) -> list[Piece]:
    if fields:
        return [(_alpaca_prompt(*fields), False), (turns[-1][1], True)]
    pieces: list[Piece] = []
    asked: list[str] = []
    for role, text in turns:
        if role != "assistant":
            asked.append(text)
            continue
        question = "\n\n".join(asked)
        # Stanford Alpaca knows one turn; later turns repeat its headings without the preamble.
        prompt = f"\n\n### Instruction:\n{question}\n\n### Response:\n" if pieces else _alpaca_prompt(question)
        pieces += [(prompt, False), (text, True)]
        asked = []
    return pieces


def _plain_pieces(turns: Sequence[Turn]) -> list[Piece]:
    last = max(index for index, (role, _) in enumerate(turns) if role == "assistant")
    pieces: list[Piece] = []
    for role, text in turns[: last + 1]:
        pieces.append((text, True) if role == "assistant" else (f"{text}\n", False))
        if role == "assistant":
            pieces.append(("\n", False))
    return pieces[:-1]


def _chat_pieces(tokenizer: Any, turns: Sequence[Turn], where: str) -> list[Piece]:
    """The chat template's text, cut where answers begin and end.

    Rendered once with marks in place of the answers: templates differ in what surrounds an answer, and some treat the
    last one differently, but all insert it whole.
    """
    marks = {index: f"@@answer-{index}-mark@@" for index, (role, _) in enumerate(turns) if role == "assistant"}
    messages = [{"role": role, "content": marks.get(index, text)} for index, (role, text) in enumerate(turns)]
    try:
        rest = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # templates raise on purpose: wrong order of roles, no system message allowed
        raise DataError(f"{where}: the chat template rejects the messages: {error}") from error
    pieces: list[Piece] = []
    for index, mark in marks.items():
        before, found, rest = rest.partition(mark)
        if not found:
            raise DataError(f"{where}: the chat template drops or changes an answer; use template alpaca or plain")
        pieces += [(before, False), (turns[index][1].strip(), True)]
    return [*pieces, (rest, False)]


def _close_answers(
    ids: list[int], owners: list[int], pieces: Sequence[Piece], closing: frozenset[int], end: int | None
) -> tuple[list[int], list[bool]]:
    """Tokens and labels, with the token that ends each answer learnt: the template's special token where one follows,
    else an end of sequence put in."""
    tokens: list[int] = []
    labelled: list[bool] = []
    position = 0
    for piece, (_, answer) in enumerate(pieces):
        while position < len(ids) and owners[position] <= piece:
            tokens.append(ids[position])
            labelled.append(answer and owners[position] == piece)
            position += 1
        if answer and position < len(ids) and ids[position] in closing:
            tokens.append(ids[position])
            labelled.append(True)
            position += 1
        elif answer and end is not None:
            tokens.append(end)
            labelled.append(True)
    return tokens, labelled


def _richest_stretch(labelled: Sequence[bool], size: int, *, counts_first: bool) -> int:
    """Start of the stretch of `size` tokens in which most labels are predicted; the first of a row never is."""
    totals = [0]
    for label in labelled:
        totals.append(totals[-1] + label)
    skip = 0 if counts_first else 1
    starts = range(len(labelled) - size + 1)
    return max(starts, key=lambda first: (totals[first + size] - totals[first + skip], -first))
