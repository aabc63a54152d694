"""Forms that rows of instruction tuning come in: what tells each, which fields it uses, and how it is read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from qratk.core.errors import DataError
from qratk.data import sharegpt
from qratk.data.conversation import Conversation, empty, listed, one_round, several_rounds
from qratk.data.sources import Row, shown

FormName = Literal["auto", "alpaca", "dolly", "hc3", "messages", "prompt", "qa", "sharegpt"]
Answers = Literal["human", "chatgpt", "all"]

_BESIDE: Final = frozenset(("system", "history", "tools"))  # fields that every form may have

_OF_ANOTHER_KIND: Final = (
    "functions", "function_call", "documents", "images", "image", "videos", "video", "audios", "audio",
    "chat_template_kwargs", "reasoning_content", "weight",
)  # fmt: skip
_BEARING: Final = ("input", "context")  # without them a question may not be the one that was answered


@dataclass(frozen=True)
class Form:
    """A form of rows.

    Attributes:
        name: That the option `form` knows it by.
        needs: Fields that a row must have; of several in one entry, any.
        more: Fields that it uses where they are there.
        example: A row of it, in JSON.
        read: Its conversations, with the answers that are asked for where it has several kinds.
    """

    name: str
    needs: tuple[tuple[str, ...], ...]
    more: frozenset[str]
    example: str
    read: Callable[[Row, Answers], Sequence[Conversation]]

    @property
    def uses(self) -> frozenset[str]:
        """Names of all fields that conversations come from."""
        return frozenset(name for names in self.needs for name in names) | self.more

    def fits(self, present: Collection[str]) -> bool:
        """Whether a row with these fields is complete."""
        return all(any(name in present for name in names) for names in self.needs)

    def conversations(self, row: Row, answers: Answers = "human") -> tuple[Conversation, ...]:
        """The conversations of a row, none where it has no answer of the kind that is asked for. Raises DataError when
        it is none, or says what is not supported."""
        for name in _OF_ANOTHER_KIND:
            if not empty(row.data.get(name)):
                raise row.error(f"has a field {name!r}, which changes what is to be learnt and is not supported")
        return tuple(replace(found, form=self.name) for found in self.read(row, answers))

    def needed(self) -> str:
        """What it needs, for people: 'prompt (prompt, completion or response)'."""
        return f"{self.name} ({', '.join(' or '.join(names) for names in self.needs)})"


def _alpaca(row: Row, _: Answers) -> list[Conversation]:
    return [one_round(row, row.text("instruction"), row.text("output"), extra=row.text("input", default=""))]


def _dolly(row: Row, _: Answers) -> list[Conversation]:
    return [one_round(row, row.text("instruction"), row.text("response"), extra=row.text("context", default=""))]


def _qa(row: Row, _: Answers) -> list[Conversation]:
    return [one_round(row, row.text("question"), row.text("answer"))]


def _messages(row: Row, _: Answers) -> list[Conversation]:
    return [several_rounds(row, listed(row, "messages", of="{role, content}"))]


def _sharegpt(row: Row, _: Answers) -> list[Conversation]:
    return [several_rounds(row, sharegpt.messages(row, listed(row, "conversations", of="{from, value}")))]


def _prompt(row: Row, _: Answers) -> list[Conversation]:
    """A prompt and what follows, as texts, or as messages of which only those of the completion are learnt."""
    given = [name for name in ("completion", "response") if row.data.get(name) is not None]
    if len(given) > 1:
        raise row.error(
            "has both `completion` and `response`; say which is learnt by `rename` and `form`, as in "
            "`rename: {instruction: prompt, output: completion}` with `form: alpaca`"
        )
    after = given[0] if given else "completion"
    if not any(isinstance(row.data.get(name), list | tuple) for name in ("prompt", after)):
        return [one_round(row, row.text("prompt"), row.text(after), joined=True)]
    asked, answered = (listed(row, name, of="{role, content}, as the other is") for name in ("prompt", after))
    return [several_rounds(row, [*asked, *answered], seen=len(asked))]


def _hc3(row: Row, answers: Answers) -> list[Conversation]:
    """A conversation for each answer; blank ones are none."""
    found: list[str] = []
    for name in ("human_answers", "chatgpt_answers"):
        if answers not in ("all", name.removesuffix("_answers")):
            continue
        given = row.data.get(name)
        if not isinstance(given, list | tuple) or not all(isinstance(answer, str) for answer in given):
            raise row.error(
                f"needs `{name}` as a list of texts (the option `answers` is {answers}); got {shown(given)}"
            )
        found += [answer for answer in given if answer.strip()]
    return [one_round(row, row.text("question"), answer) for answer in found]


FORMS: Final[dict[str, Form]] = {
    form.name: form
    for form in (
        Form(
            "messages",
            (("messages",),),
            _BESIDE,
            '{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}',
            _messages,
        ),
        Form(
            "sharegpt",
            (("conversations",),),
            _BESIDE,
            '{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}',
            _sharegpt,
        ),
        Form(
            "alpaca",
            (("instruction",), ("output",)),
            _BESIDE | {"input"},
            '{"instruction": ..., "input": ..., "output": ...}',
            _alpaca,
        ),
        Form(
            "dolly",
            (("instruction",), ("response",)),
            _BESIDE | {"context"},
            '{"instruction": ..., "context": ..., "response": ...}',
            _dolly,
        ),
        Form(
            "prompt",
            (("prompt",), ("completion", "response")),
            _BESIDE,
            '{"prompt": ..., "completion": ...}',
            _prompt,
        ),
        Form(
            "hc3",
            (("question",), ("human_answers", "chatgpt_answers")),
            _BESIDE,
            '{"question": ..., "human_answers": [...], "chatgpt_answers": [...]}',
            _hc3,
        ),
        Form("qa", (("question",), ("answer",)), _BESIDE, '{"question": ..., "answer": ...}', _qa),
    )
}
"""Every form by its name."""


def recognised(row: Row, *, ignoring: Collection[str] = ()) -> Form:
    """The form of a row by its fields, null ones and `ignoring` left aside. Raises DataError unless there is one."""
    present = {name for name, value in row.data.items() if value is not None and name not in ignoring}
    fitting = [form for form in FORMS.values() if form.fits(present)]
    if "choices" in present and fitting in ([], [FORMS["qa"]]):
        raise row.error("has `choices`: rows of multiple choice are for `data: MultipleChoiceData`")
    if not fitting:
        raise _of_no_form(row, present)
    if len(fitting) > 1:
        raise row.error(
            f"has the fields of several forms: {', '.join(form.needed() for form in fitting)}; "
            f"say which by the option `form`, as in `form: {fitting[0].name}`"
        )
    form = fitting[0]
    if {"chosen", "rejected"} <= present or isinstance(row.data.get("label"), bool):
        raise row.error(
            f"has {'a true-or-false `label`' if 'label' in present else '`chosen` and `rejected` answers'}, as rows of "
            f"preference training, which is not supported: keep the good answers alone, or leave that out by "
            f"`form: {form.name}`"
        )
    for name in _BEARING:
        if name in present - form.uses and not empty(row.data[name]):
            raise row.error(
                f"has a field {name!r}, which the form {form.name} does not use; `rename` makes it a field of a form "
                f"that does, such as alpaca's `input`, and `form: {form.name}` leaves it out"
            )
    return form


def _of_no_form(row: Row, present: Collection[str]) -> DataError:
    if {"chosen", "rejected"} <= set(present):
        return row.error("has `chosen` and `rejected` answers, as for preference training, which is not supported")
    if "text" in present:
        return row.error("has a plain `text`, in which no answer can be told: use `data: TextData`")
    near = [form for form in FORMS.values() if (form.uses - _BESIDE) & set(present)] or list(FORMS.values())
    null = [name for name in row.data if name not in present]
    return row.error(
        f"has {'only ' + ', '.join(map(shown, sorted(present))) if present else 'no fields'}"
        f"{' (null or renamed: ' + ', '.join(map(shown, null)) + ')' if null else ''}; it needs those of a form: "
        f"{', '.join(form.needed() for form in near)} (the option `rename` maps other names)"
    )


def require_form(name: Any) -> None:
    """Raise DataError for a form that there is not."""
    if name != "auto" and name not in FORMS:
        raise DataError(f"form must be auto, or one of {', '.join(FORMS)}; got {name!r}")
