"""Rows in the forms of public data sets are recognised by their fields, and what is learnt of each is its answers."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from typing import Any

import pytest

from qratk.core import DataError
from qratk.data import InstructionData, TextData
from qratk.data.forms import FORMS, recognised
from qratk.data.sources import Row
from qratk.settings.identity import comparable

Write = Callable[[str, list[Any]], str]

ALPACA = {"instruction": "Add.", "input": "2 and 2", "output": "Four."}
DOLLY = {"instruction": "Which animal barks?", "context": "A dog barks.", "response": "The dog.", "category": "qa"}
GSM8K = {
    "question": "Natalia sold 48 clips, and half as many in May. How many in all?",
    "answer": "She sold 48/2 = <<48/2=24>>24 in May.\nIn all 48+24 = <<48+24=72>>72.\n#### 72",
}
HC3 = {
    "id": "0",
    "question": "Why is the sky blue?",
    "human_answers": ["Light is scattered.", " \n", "Because of air."],
    "chatgpt_answers": ["The sky is blue."],
    "source": "reddit_eli5",
}
PROMPT = {"prompt": "The sky is", "completion": " blue."}
TURNS = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "sky?"},
    {"from": "gpt", "value": "blue"},
    {"from": "human", "value": "dog?"},
    {"from": "gpt", "value": "barks"},
]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "sky?"},
    {"role": "assistant", "content": "blue"},
    {"role": "user", "content": "dog?"},
    {"role": "assistant", "content": "barks"},
]
ROWS = {
    "alpaca": ALPACA,
    "dolly": DOLLY,
    "hc3": HC3,
    "messages": {"messages": MESSAGES},
    "prompt": PROMPT,
    "qa": GSM8K,
    "sharegpt": {"id": "1_0", "conversations": TURNS},
}


def make(write: Write, tokenizer: Any, rows: list[Any], **options: Any) -> InstructionData:
    data = InstructionData(test=write("test.jsonl", rows), **options)
    data.attach(tokenizer)
    return data


def learnt(write: Write, tokenizer: Any, *rows: Any, **options: Any) -> list[str]:
    """What is learnt of rows."""
    encoded = make(write, tokenizer, list(rows), **options).scoring_rows("test")
    return [tokenizer.decode(row.tokens[row.labelled]) for row in encoded]


def whole(write: Write, tokenizer: Any, row: Any, **options: Any) -> str:
    (encoded,) = make(write, tokenizer, [row], **options).scoring_rows("test")
    return str(tokenizer.decode(encoded.tokens))


@pytest.mark.parametrize(
    ("form", "answers"),
    [
        ("alpaca", ["Four.<|end|>"]),
        ("dolly", ["The dog.<|end|>"]),
        ("hc3", ["Light is scattered.<|end|>", "Because of air.<|end|>"]),
        ("messages", ["blue<|end|>barks<|end|>"]),
        ("prompt", ["blue.<|end|>"]),  # the template strips it
        ("qa", [GSM8K["answer"] + "<|end|>"]),
        ("sharegpt", ["blue<|end|>barks<|end|>"]),
    ],
)
def test_each_form_is_recognised_told_and_its_answers_are_learnt(
    write: Write, chat_tokenizer: Any, form: str, answers: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert learnt(write, chat_tokenizer, ROWS[form]) == answers
    assert f"test rows: {len(answers)} {form}" in [record.message for record in caplog.records]
    assert learnt(write, chat_tokenizer, ROWS[form], form=form) == answers
    assert make(write, chat_tokenizer, [ROWS[form]]).describe()["test"]["forms"] == {form: len(answers)}


def test_every_form_has_a_row_here_and_its_example_is_recognised() -> None:
    assert set(ROWS) == set(FORMS)
    for name, form in FORMS.items():
        assert recognised(Row(json.loads(form.example.replace("...", '"a"')), "here")).name == name


def test_sharegpt_says_what_the_same_messages_say(write: Write, chat_tokenizer: Any) -> None:
    expected = whole(write, chat_tokenizer, {"messages": MESSAGES})
    assert whole(write, chat_tokenizer, {"conversations": TURNS}) == expected
    others = {"human": "user", "gpt": "chatgpt", "system": "system"}
    assert (
        whole(write, chat_tokenizer, {"conversations": [{**t, "from": others[t["from"]]} for t in TURNS]}) == expected
    )
    assert whole(write, chat_tokenizer, {"conversations": MESSAGES}) == expected
    assert whole(write, chat_tokenizer, {"conversations": TURNS[1:], "system": "Be brief."}) == expected


def test_a_turn_of_weight_0_is_not_learnt(write: Write, chat_tokenizer: Any) -> None:
    turns = [*TURNS[:2], {**TURNS[2], "weight": 0}, {**TURNS[3], "weight": 0}, {**TURNS[4], "weight": 1}]
    assert learnt(write, chat_tokenizer, {"conversations": turns}) == ["barks<|end|>"]


def in_parts(text: str) -> list[dict[str, Any]]:
    """Content of a message in parts; a column of a file gives every part the fields of all."""
    half = len(text) // 2
    return [{"type": "text", "text": part, "image_url": None} for part in (text[:half], text[half:])]


@pytest.mark.parametrize("field", ["messages", "conversations"])
def test_content_in_parts_is_their_texts_together(write: Write, chat_tokenizer: Any, field: str) -> None:
    parted = [{**message, "content": in_parts(message["content"])} for message in MESSAGES]
    data, plain = (make(write, chat_tokenizer, [{field: rows}]) for rows in (parted, MESSAGES))
    assert data.items("test")[0].content.messages == plain.items("test")[0].content.messages
    assert data.items("test")[0].key == plain.items("test")[0].key
    assert whole(write, chat_tokenizer, {field: parted}) == whole(write, chat_tokenizer, {"messages": MESSAGES})


@pytest.mark.parametrize("field", ["messages", "conversations"])
def test_the_developer_is_the_system_where_the_template_knows_none_and_that_is_said(
    write: Write, chat_tokenizer: Any, field: str
) -> None:
    developed = {field: [{**MESSAGES[0], "role": "developer"}, *MESSAGES[1:]]}
    system = whole(write, chat_tokenizer, {"messages": MESSAGES})
    data = make(write, chat_tokenizer, [developed])
    (row,) = data.scoring_rows("test")
    assert chat_tokenizer.decode(row.tokens) == system
    note = "the chat template knows no role 'developer': messages of it in 1 rows are the system's"
    assert note in data.notes
    knowing = copy.deepcopy(chat_tokenizer)
    knowing.chat_template = "{# system, developer, user #}" + chat_tokenizer.chat_template
    data = make(write, knowing, [developed])
    (row,) = data.scoring_rows("test")
    assert knowing.decode(row.tokens) == system.replace("<|turn|>system", "<|turn|>developer")
    assert note not in data.notes
    for template in ("plain", "alpaca"):
        texts = [whole(write, chat_tokenizer, row, template=template) for row in (developed, {"messages": MESSAGES})]
        assert texts[0] == texts[1]


def test_calls_of_tools_in_sharegpt_are_those_of_messages(write: Write) -> None:
    call = {"name": "weather", "arguments": {"town": 3}}
    turns = [TURNS[1], {"from": "function_call", "value": json.dumps(call)}, {"from": "observation", "value": "12"},
             TURNS[2]]  # fmt: skip
    content = make(write, None, [{"conversations": turns, "tools": '[{"name": "weather"}]'}]).items("test")[0].content
    assert content.tools == ({"name": "weather"},)
    assert content.messages[1] == {
        "role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]
    }  # fmt: skip
    assert content.messages[2] == {"role": "tool", "content": "12"}
    assert content.learnt == (False, True, False, True)


def test_a_completion_of_messages_is_learnt_and_its_prompt_is_not(write: Write, chat_tokenizer: Any) -> None:
    row = {"prompt": MESSAGES[:4], "completion": MESSAGES[4:]}
    assert learnt(write, chat_tokenizer, row) == ["barks<|end|>"]
    assert whole(write, chat_tokenizer, row) == whole(write, chat_tokenizer, {"messages": MESSAGES})


def test_a_completion_follows_its_prompt_without_a_template(write: Write, tokenizer: Any) -> None:
    assert whole(write, tokenizer, PROMPT, template="plain") == "<s>The sky is blue.</s>"
    assert learnt(write, tokenizer, PROMPT, template="plain") == [" blue.</s>"]
    system = {**PROMPT, "system": "Be brief."}
    assert whole(write, tokenizer, system, template="plain") == "<s>Be brief.\nThe sky is\n blue.</s>"


def test_dolly_is_alpaca_by_other_names(write: Write, tokenizer: Any) -> None:
    alpaca = {"instruction": DOLLY["instruction"], "input": DOLLY["context"], "output": DOLLY["response"]}
    assert whole(write, tokenizer, DOLLY) == whole(write, tokenizer, alpaca)
    assert whole(write, tokenizer, {**DOLLY, "context": ""}) == whole(write, tokenizer, {**alpaca, "input": ""})


@pytest.mark.parametrize(("answers", "count"), [("human", 2), ("chatgpt", 1), ("all", 3)])
def test_answers_of_hc3_are_rows_of_their_own(write: Write, answers: Any, count: int) -> None:
    items = InstructionData(test=write("test.jsonl", [HC3]), answers=answers).items("test")
    assert len(items) == count
    assert len({item.key for item in items}) == count


def test_rows_of_hc3_without_the_answers_asked_for_are_left_out_and_told(
    write: Write, chat_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [HC3, {**HC3, "chatgpt_answers": []}, {**HC3, "question": "b", "chatgpt_answers": [""]}]
    data = make(write, chat_tokenizer, rows, answers="chatgpt")
    assert len(data.items("test")) == 1
    text = "2 of 3 test rows hold no answer: left out"
    assert any(text in note and "test.jsonl, line 2" in note for note in data.describe()["warnings"])
    assert sum(text in record.message for record in caplog.records) == 1
    with pytest.raises(DataError, match=r"line 1: the row needs `human_answers` as a list"):
        make(write, chat_tokenizer, [{"question": "a", "chatgpt_answers": ["b"]}]).items("test")
    with pytest.raises(DataError, match="none of the 1 test rows holds an answer"):
        make(write, chat_tokenizer, rows[1:2], answers="chatgpt").items("test")


def test_answers_to_one_question_are_never_held_out_apart(write: Write) -> None:
    rows = [{**HC3, "question": f"q{k}", "human_answers": [f"{k}-{j}" for j in range(1 + k % 3)]} for k in range(12)]
    data = InstructionData(write("train.jsonl", rows), validation_items=5)
    asked = [{item.content.messages[0]["content"] for item in data.items(split)} for split in ("train", "validation")]
    assert not asked[0] & asked[1]
    assert 5 <= len(data.items("validation")) <= 7
    assert len(data.items("train")) + len(data.items("validation")) == 24
    with pytest.raises(DataError, match="cannot take 1 validation items off 1 rows"):
        InstructionData(write("train.jsonl", [HC3]), validation_items=1).items("train")


def test_rows_of_several_forms_in_one_file_are_told(write: Write, chat_tokenizer: Any) -> None:
    rows = [ALPACA, {**ALPACA, "instruction": "Sum.", "messages": None}, {"messages": MESSAGES, "instruction": None}]
    data = make(write, chat_tokenizer, rows)
    assert data.describe()["test"]["forms"] == {"alpaca": 2, "messages": 1}
    assert data.describe()["warnings"] == ["test rows are of several forms: 2 alpaca, 1 messages"]


def test_fields_that_a_rows_own_form_does_not_use_are_told(write: Write, chat_tokenizer: Any) -> None:
    data = make(write, chat_tokenizer, [{**ALPACA, "question": "x"}, GSM8K])
    assert data.describe()["warnings"][-1] == "fields of the rows that are not used: 'question'"
    data = make(write, chat_tokenizer, [{**ALPACA, "context": "x"}], form="alpaca")
    assert data.describe()["warnings"][-1] == "fields of the rows that are not used: 'context'"


def test_renamed_fields_are_those_of_their_new_names_alone(write: Write, chat_tokenizer: Any) -> None:
    data = make(write, chat_tokenizer, [PROMPT], rename={"instruction": "prompt", "output": "completion"})
    assert data.items("test")[0].content.form == "alpaca"
    assert data.describe()["warnings"] == []
    swapped = {"completion": "The sky is", "prompt": "blue"}
    data = make(write, chat_tokenizer, [swapped], rename={"prompt": "completion", "completion": "prompt"})
    assert data.items("test")[0].content.turns == [("user", "The sky is"), ("assistant", "blue")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**ALPACA, "messages": MESSAGES}, r"has the fields of several forms: messages \(messages\), alpaca \(instru"
         r"ction, output\); say which by the option `form`, as in `form: messages`"),
        ({**DOLLY, "prompt": "x"}, r"has the fields of several forms: dolly .*, prompt \(prompt, completion or"),
        ({**HC3, "answer": "x"}, "has the fields of several forms: hc3 .*, qa"),
        ({**PROMPT, "response": "x"}, "has both `completion` and `response`"),
        ({**PROMPT, "label": False}, "has a true-or-false `label`, as rows of preference training, .* `form: prompt`"),
        ({"messages": MESSAGES, "label": True}, "has a true-or-false `label`"),
        ({"conversations": TURNS, "chosen": {}, "rejected": {}}, "has `chosen` and `rejected` .* `form: sharegpt`"),
        ({**PROMPT, "chat_template_kwargs": {"x": 1}}, "has a field 'chat_template_kwargs'"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "has `chosen` and `rejected` answers"),
        ({"prompt": [MESSAGES[1]], "completion": "b"}, "needs `completion`, a list of {role, content}, as the other"),
        ({"prompt": [{**MESSAGES[1]}], "completion": [MESSAGES[1]]}, "has no message of the assistant"),
        ({"prompt": [{**MESSAGES[2], "weight": 1}], "completion": [MESSAGES[2]]}, "gives a message of its prompt a"),
        ({"prompt": 3, "completion": "b"}, "needs a text field 'prompt'"),
        ({"text": "a b c"}, "has a plain `text`, in which no answer can be told: use `data: TextData`"),
        ({"question": "a", "choices": ["b", "c"], "answer": "A"}, "has `choices`: .* `data: MultipleChoiceData`"),
        ({"question": "a", "choices": ["b", "c"], "label": 0}, "has `choices`: .* `data: MultipleChoiceData`"),
        ({**ALPACA, "context": "x"}, "has a field 'context', which the form alpaca does not use; `rename`"),
        ({**GSM8K, "context": "x"}, "has a field 'context', which the form qa does not use; .* `form: qa` leaves it"),
        ({"question": "a"}, r"has only 'question'; it needs those of a form: hc3 \(question, human_answers or chatg"),
        ({"instruction": "a", "output": None}, r"has only 'instruction' \(null or renamed: 'output'\)"),
        ({}, "has no fields; it needs those of a form: messages"),
        ({"question": "a", "answer": 3}, "needs a text field 'answer'"),
        ({"question": "a", "human_answers": "b"}, "needs `human_answers` as a list of texts"),
        ({"conversations": []}, "needs `conversations`, a list of {from, value}"),
        ({"conversations": TURNS[:2]}, "has no message of the assistant"),
        ({"conversations": [TURNS[1], {"from": "narrator", "value": "x"}]}, "has a turn from 'narrator'; known"),
        ({"conversations": [TURNS[1], {"value": "x"}]}, "has a turn from None"),
        ({"conversations": [TURNS[1], {"from": "gpt", "value": None}]}, "has a turn without a text 'value'"),
        ({"conversations": [TURNS[1], "blue"]}, "has a turn that is no object of `from` and `value`: 'blue'"),
        ({"conversations": [TURNS[1], {**TURNS[2], "loss": False}]}, "has a message with 'loss'"),
        ({"conversations": [TURNS[1], {**TURNS[2], "weight": 0}]}, "gives every message of the assistant the weight 0"),
        ({"conversations": [TURNS[1], {"from": "function_call", "value": "weather()"}]}, "has a call of a tool that"),
        ({"conversations": TURNS, "history": [["a", "b"]]}, "has a `history` beside messages"),
        *(
            ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, part]}, MESSAGES[2]]}, message)
            for part, message in (
                ({"type": "image_url", "image_url": {"url": "x"}}, "has a message with a part of type 'image_url'; o"),
                ({"type": "refusal", "refusal": "no"}, "has a message with a part of type 'refusal'; only parts of ty"),
                ("b", "has a message with a part that is no object with a `type`: 'b'"),
                ({"type": "text", "text": None}, "has a part of type 'text' that is no {type, text}: "),
                ({"type": "text", "text": "a", "cache": 1}, "has a part of type 'text' that is no {type, text}: "),
            )
        ),
        ({"system": "Be long.", "messages": [{**MESSAGES[0], "role": "developer"}, *MESSAGES[1:]]},
         "has a field 'system' beside another system message"),
    ],
)  # fmt: skip
def test_what_cannot_be_learnt_from_is_refused_with_file_and_line(write: Write, row: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"test.jsonl, line 1: the row {message}"):
        InstructionData(test=write("test.jsonl", [row])).items("test")


def test_a_form_that_is_set_decides_between_several(write: Write, chat_tokenizer: Any) -> None:
    both = {**ALPACA, "messages": MESSAGES}
    assert learnt(write, chat_tokenizer, both, form="alpaca") == ["Four.<|end|>"]
    assert learnt(write, chat_tokenizer, both, form="messages") == ["blue<|end|>barks<|end|>"]
    rated = {"messages": MESSAGES, "chosen": MESSAGES, "rejected": [], "label": True}
    assert learnt(write, chat_tokenizer, rated, form="messages") == ["blue<|end|>barks<|end|>"]
    with pytest.raises(DataError, match="line 1: the row needs a text field 'response'"):
        learnt(write, chat_tokenizer, both, form="dolly")


def test_options_that_there_are_not_are_refused() -> None:
    with pytest.raises(DataError, match=r"form must be auto, or one of messages, sharegpt, .*got 'sharegtp'"):
        InstructionData("a.jsonl", form="sharegtp")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="answers must be human, chatgpt or all, got 'robot'"):
        InstructionData("a.jsonl", answers="robot")  # type: ignore[arg-type]


def test_a_module_that_only_knows_parse_and_fields_reads_as_before(write: Write, tokenizer: Any) -> None:
    class Reversed(TextData):
        def parse(self, row: Row) -> str:
            return super().parse(row)[::-1]

    data = Reversed(test=write("test.jsonl", [{"text": "ab", "extra": 1}]))
    data.attach(tokenizer)
    assert [item.content for item in data.items("test")] == ["ba"]
    assert data.describe()["test"]["forms"] == {"text": 1}
    assert data.describe()["warnings"] == ["fields of the rows that are not used: 'extra'"]


def test_a_search_of_before_forms_had_names_goes_on() -> None:
    before, now = (
        {"data.init_args.template": "chat"},
        {"data.init_args.form": "auto", "data.init_args.answers": "human"},
    )
    assert comparable({**before, **now}) == comparable(before)
    assert comparable({**before, "data.init_args.form": "alpaca"}) != comparable(before)


@pytest.mark.parametrize("chat", [False, True])
def test_parts_of_a_suite_are_compared_as_data_alone(chat: bool) -> None:
    def part(**options: Any) -> dict[str, Any]:
        return {"data": {"class_path": "LmEvalData", "init_args": {"task": "a", **options}}, "weight": 2}

    def suite(**options: Any) -> dict[str, Any]:
        task = part(**options)["data"]
        return {
            "data.init_args.train": [part(**options)],
            "data.init_args.validation.a.data.class_path": task["class_path"],
            **{f"data.init_args.validation.a.data.init_args.{key}": one for key, one in task["init_args"].items()},
        }

    now = suite(apply_chat_template=chat, fewshot_as_multiturn=None)
    assert (comparable(now) == comparable(suite())) is not chat


@pytest.mark.parametrize(
    ("name", "form"), [("alpaca_long", "alpaca"), ("self_instruct_seed", "alpaca"), ("gsm8k", "qa")]
)
def test_published_rows_are_recognised(shared: Any, tokenizer: Any, name: str, form: str) -> None:
    data = InstructionData(str(shared / "datasets" / name / "train.jsonl"), max_train_items=50, validation_items=5)
    assert {item.content.form for item in data.items("train")} == {form}
