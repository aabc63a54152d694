"""Instruction tuning: prompts and answers, where only answers are learnt and scored."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from qratk.core.errors import DataError
from qratk.data.answers import Piece, end_answers, label_answers, pieces_of
from qratk.data.base import TaskData
from qratk.data.chat import ChatTemplate
from qratk.data.conversation import Conversation
from qratk.data.encoding import Encoded, encode_pieces, encoded, special_ids
from qratk.data.forms import FORMS, Answers, Form, FormName, recognised, require_form
from qratk.data.scoring import LikelihoodScorer
from qratk.data.shots import Shots, as_text, as_turns
from qratk.data.sources import Row
from qratk.data.splits import Item, Split
from qratk.data.task import ShotStyle
from qratk.data.text import scored_tokens

_logger = logging.getLogger(__name__)

TemplateName = Literal["auto", "alpaca", "chat", "plain"]

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
    """Rows of questions and answers, in the forms of public data sets; the score is minus nats per answer token.

    Forms are Alpaca's, messages, ShareGPT's, prompt and completion, Dolly's, HC3's, question and answer (docs/data.md).
    Beside their fields, rows may have `system`, `tools` and, where they are no messages, `history` (pairs of question
    and answer); a message of the assistant `tool_calls`, `reasoning_content`, and a `weight` of 0 when it is not to be
    learnt. Through the chat template a row is token for token what the tokenizer's `apply_chat_template` makes of it,
    or it is refused.

    Args:
        train: As in `TaskData`, whose other options apply too.
        form: Form of all rows; `auto` recognises that of each row by its fields.
        answers: Which answers of HC3 are learnt, each as a row of its own: `human`, `chatgpt` or `all`.
        template: `chat` is the tokenizer's own template, `alpaca` the prompt of Stanford Alpaca, `plain` the bare texts
            with line breaks between them, but for a prompt and its completion; `auto` is `chat` where the tokenizer has
            a template, else `alpaca`.
    """

    metrics = ("token_prob",)

    def __init__(
        self,
        train: str | list[str] | None = None,
        *,
        template: TemplateName = "auto",
        form: FormName = "auto",
        answers: Answers = "human",
        **kwargs: Any,
    ) -> None:
        super().__init__(train, **kwargs)
        require_form(form)
        if answers not in ("human", "chatgpt", "all"):
            raise DataError(f"answers must be human, chatgpt or all, got {answers!r}")
        self.form, self.answers = form, answers
        if template not in ("auto", "alpaca", "chat", "plain"):
            raise DataError(f"template must be auto, alpaca, chat or plain, got {template!r}")
        self.template = template
        self._told: dict[str, None] = {}
        self._recognised: tuple[Row, Form] | None = None

    def options(self) -> Mapping[str, Any]:
        """The template."""
        return {"template": self.template}

    def _form(self, row: Row) -> Form:
        """The form of a row: the one that is set, or recognised by its fields as they are named in the file."""
        if self.form != "auto":
            return FORMS[self.form]
        if self._recognised is None or self._recognised[0] is not row:  # it is asked for several times
            renamed = self._options.rename or {}
            self._recognised = row, recognised(row, ignoring=set(renamed.values()) - set(renamed))
        return self._recognised[1]

    def parse(self, row: Row) -> Conversation:
        """The conversation of a row, the first where it holds several answers. Raises DataError where it has none."""
        found = self._form(row).conversations(row, self.answers)
        if not found:
            raise row.error("holds no answer")
        return found[0]

    def contents(self, row: Row) -> Sequence[Conversation]:
        """The conversation of a row; where it holds several answers, one with each."""
        form = self._form(row)
        return form.conversations(row, self.answers) if form.name == "hc3" else (self.parse(row),)

    def form_of(self, content: Any) -> str:
        """Name of the form that a conversation was read from."""
        return content.form if isinstance(content, Conversation) else super().form_of(content)

    def fields_of(self, row: Row) -> frozenset[str]:
        """Fields of the row's form."""
        return self._form(row).uses

    def fields_used(self) -> frozenset[str]:
        """Fields of all forms that rows may have."""
        return frozenset().union(*(form.uses for form in FORMS.values() if self.form in ("auto", form.name)))

    @property
    def template_in_use(self) -> Literal["alpaca", "chat", "plain"]:
        """What `auto` comes to. Raises DataError when a chat template is asked for and there is none."""
        has_chat = bool(getattr(self.tokenizer, "chat_template", None))
        if self.template == "chat" and not has_chat:
            raise DataError("template is chat, but the tokenizer has no chat template: use alpaca, plain or auto")
        if self.template == "auto":
            return "chat" if has_chat else "alpaca"
        return self.template

    def _encode(self, items: Sequence[Item]) -> Iterator[Encoded]:
        form = self.template_in_use
        encode = self._chat_rows(items) if form == "chat" else self._own_rows(items, form)
        for index, (tokens, labelled) in enumerate(encode):
            yield self._fit(tokens, labelled, index)

    def _chat_rows(self, items: Sequence[Item]) -> Iterator[tuple[list[int], list[bool]]]:
        """Tokens of the chat template's own text, and labels: of answers, and of the special token that ends each."""
        template, closing = ChatTemplate(self.tokenizer), special_ids(self.tokenizer)
        ignored: dict[str, None] = {}
        open_ended = asked_otherwise = developed = 0
        for item in items:
            given = as_turns(item)
            content = template.known(given)
            developed += content is not given
            ignored |= dict.fromkeys(template.ignored(content))
            text = template.text(content, item.where)
            spans = template.spans(content, text, item.where)
            template.require_reasoning(content, text, spans, item.where)
            asked_otherwise += not template.asks_as_learnt(text, spans)
            pieces = pieces_of(text, spans)
            ids, owners = encode_pieces(self.tokenizer, pieces, special=False)
            labelled, closed = label_answers(ids, owners, pieces, closing, blank=self._is_blank)
            open_ended += not closed
            yield ids, labelled
        self._tell(ignored, open_ended)
        if developed:
            self._tell_once(
                f"the chat template knows no role 'developer': messages of it in {developed} rows are the system's"
            )
        if asked_otherwise:
            self._tell_once(
                f"the chat template asks for an answer by {template.generation_prompt!r}, which does not stand before "
                f"the last answer of {asked_otherwise} rows: there it is trained on another prompt"
            )

    def _own_rows(
        self, items: Sequence[Item], form: Literal["alpaca", "plain"]
    ) -> Iterator[tuple[list[int], list[bool]]]:
        """Tokens of a form of ours, and labels: of answers, and of an end of sequence behind each."""
        end = self.tokenizer.eos_token_id

        def pieces_in(content: Conversation, where: str) -> list[Piece]:
            for name in content.told():
                raise DataError(f"{where}: template {form} has no place for {name!r}; use the chat template")
            return _alpaca_pieces(content) if form == "alpaca" else _plain_pieces(content)

        for item in items:
            pieces = as_text(item, pieces_in)
            ids, owners = encode_pieces(self.tokenizer, pieces, special=True)
            yield end_answers(ids, owners, pieces, end)

    def _is_blank(self, token: int) -> bool:
        return not str(self.tokenizer.decode([token])).strip()

    def _tell(self, ignored: Mapping[str, None], open_ended: int) -> None:
        if ignored:
            self._tell_once(f"fields of messages that the chat template does not use: {', '.join(ignored)}")
        if open_ended:
            self._tell_once(
                f"the chat template puts no special token behind an answer of {open_ended} rows: there the model does "
                f"not learn to stop"
            )

    def _tell_once(self, text: str) -> None:
        if text not in self._told:
            self._told[text] = None
            _logger.warning(text)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was dropped and why, what is not used, and what the chat template does not do."""
        return (*super().notes, *self._told)

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

    def behind(self, items: Sequence[Item], examples: Sequence[Item], style: ShotStyle) -> Sequence[Item]:
        """Items behind examples: earlier turns of the chat template, text with delimiters in a form of ours."""
        shots = Shots.of(examples, style)
        return [replace(item, before=shots) for item in items]

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


def _alpaca_prompt(instruction: str, extra: str = "") -> str:
    if extra.strip():
        return ALPACA_INPUT.format(instruction=instruction, input=extra)
    return ALPACA_NO_INPUT.format(instruction=instruction)


def _alpaca_pieces(content: Conversation) -> list[Piece]:
    if content.fields:
        return [(_alpaca_prompt(*content.fields), False), (content.turns[-1][1], content.learnt[-1])]
    pieces: list[Piece] = []
    asked: list[str] = []
    for (role, text), learnt in zip(content.turns, content.learnt, strict=True):
        if role != "assistant":
            asked.append(text)
            continue
        question = "\n\n".join(asked)
        # Stanford Alpaca knows one turn; later turns repeat its headings without the preamble.
        prompt = f"\n\n### Instruction:\n{question}\n\n### Response:\n" if pieces else _alpaca_prompt(question)
        pieces += [(prompt, False), (text, learnt)]
        asked = []
    return pieces


def _plain_pieces(content: Conversation) -> list[Piece]:
    turns = content.turns
    if content.joined:
        return [(turns[0][1], False), (turns[1][1], content.learnt[1])]
    last = max(index for index, (role, _) in enumerate(turns) if role == "assistant")
    pieces: list[Piece] = []
    for (role, text), learnt in list(zip(turns, content.learnt, strict=True))[: last + 1]:
        pieces.append((text, learnt) if role == "assistant" else (f"{text}\n", False))
        if role == "assistant":
            pieces.append(("\n", False))
    return pieces[:-1]


def _richest_stretch(labelled: Sequence[bool], size: int, *, counts_first: bool) -> int:
    """Start of the stretch of `size` tokens in which most labels are predicted; the first of a row never is."""
    totals = [0]
    for label in labelled:
        totals.append(totals[-1] + label)
    skip = 0 if counts_first else 1
    starts = range(len(labelled) - size + 1)
    return max(starts, key=lambda first: (totals[first + size] - totals[first + skip], -first))
