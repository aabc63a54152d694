"""Rows of conversations are what the tokenizer's chat template makes of them, and the answers in them are learnt."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from qratk.core import DataError
from qratk.data import InstructionData, MultipleChoiceData
from qratk.data.encoding import Encoded, encode_pieces
from qratk.data.sources import content_key

Write = Callable[[str, list[Any]], str]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = (
    "{% if tools %}<|im_start|>system\nTOOLS {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if m.tool_calls %}<tool_call>{{ m.tool_calls | tojson }}</tool_call>{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As reasoning models' do: the block is split off, earlier turns lose it, the last turn always has one.
THINK = """\
{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}{%- if m.role == 'assistant' -%}
{%- set content = m.content -%}{%- set reason = '' -%}
{%- if m.reasoning_content is defined and m.reasoning_content is string -%}{%- set reason = m.reasoning_content -%}
{%- elif '</think>' in content -%}
{%- set reason = content.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{%- if loop.index0 > ns.last -%}
{{ '<|im_start|>assistant\\n<think>\\n' + reason + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
{%- else -%}{{ '<|im_start|>assistant\\n' + content }}{%- endif -%}{{ '<|im_end|>\\n' }}
{%- else -%}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif -%}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""
# An answer is stripped, and a space stands before what ends it.
SPACED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content | trim }} {{ eos_token }}"
    "{% else %}[INST] {{ m.content | trim }} [/INST]{% endif %}{% endfor %}"
)
# As models that always reason: the block is opened by what asks for an answer.
OPENED = THINK.replace(
    "{{ '<|im_start|>assistant\\n' }}{%- endif -%}", "{{ '<|im_start|>assistant\\n<think>\\n' }}{%- endif -%}"
)
# As those distilled from one: the block is asked for, and dropped from every answer.
DROPPED = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# An end of sequence behind the end of the last turn.
ENDED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}"
)
# What is generated is marked, as training libraries ask of templates.
GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "tools": TOOLS, "think": THINK, "spaced": SPACED}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"town": 3}'}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}


def build(template: str | None = None, *, ends: bool = False) -> Any:
    """Byte-level BPE; with `ends` it puts <s> before each text and </s> behind it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(
        ["assistant system user the sky is blue, the answer is yes. <think> </think>"] * 4, trainer
    )
    if ends:
        pairs = [("<s>", 0), ("</s>", 1)]
        backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=pairs)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


TOKENIZERS = {name: build(template) for name, template in TEMPLATES.items()}
ENDING = build(ends=True)


def rows_of(write: Write, tokenizer: Any, rows: list[Any], **options: Any) -> tuple[Encoded, ...]:
    data = InstructionData(test=write("test.jsonl", rows), **options)
    data.attach(tokenizer)
    return data.scoring_rows("test")


def rendered(tokenizer: Any, messages: list[Any], tools: list[Any] | None = None) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=False)
    return ids


def learnt(tokenizer: Any, row: Encoded) -> str:
    return str(tokenizer.decode(row.tokens[row.labelled]))


WORDS = st.sampled_from(
    [
        "yes",
        "The sky is blue.",
        " spaced \n",
        "\u00e9\U0001f600",
        "think",
        "assistant",
        "<|im_end|>",
        "a\nb",
        "@@answer",
        "",
        "n",
    ]
)
TEXT = st.lists(WORDS, max_size=3).map(" ".join)
SAID = st.tuples(TEXT, TEXT, st.sampled_from(["plain", "block", "reasoning"]))


@st.composite
def conversations(draw: Any, kind: str) -> dict[str, Any]:
    """A row of one to three rounds; with what the kind of template knows."""
    messages: list[dict[str, Any]] = []
    if kind != "spaced" and draw(st.booleans()):
        messages.append({"role": "system", "content": draw(TEXT)})
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(TEXT)})
        if kind == "tools" and draw(st.booleans()):
            messages.append({"role": "assistant", "content": draw(TEXT), "tool_calls": [CALL]})
            messages.append({"role": "tool", "tool_call_id": "c1", "content": draw(TEXT)})
        text, reason, form = draw(SAID)
        answer: dict[str, Any] = {"role": "assistant", "content": text}
        if kind == "think" and form == "block":
            answer["content"] = f"<think>\n{reason}\n</think>\n\n{text}"
        if kind == "think" and form == "reasoning":
            answer["reasoning_content"] = reason
        messages.append(answer)
    return {"messages": messages, **({"tools": [TOOL]} if kind == "tools" and draw(st.booleans()) else {})}


@pytest.mark.parametrize("kind", list(TEMPLATES))
def test_rows_are_what_the_template_makes_of_them_token_for_token(kind: str, tmp_path: Path) -> None:
    tokenizer, path = TOKENIZERS[kind], tmp_path / "rows.jsonl"

    @settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(row=conversations(kind))
    def check(row: dict[str, Any]) -> None:
        path.write_text(json.dumps(row) + "\n")
        data = InstructionData(test=str(path))
        data.attach(tokenizer)
        (encoded,) = data.encode_training(data.items("test"))
        assert encoded.tokens.tolist() == rendered(tokenizer, row["messages"], row.get("tools"))
        # Nothing of what is asked is learnt: as many ends of turns as answers, and no header of a turn.
        text = learnt(tokenizer, encoded)
        assert "<|im_start|>" not in text
        last = row["messages"][-1]["content"].split("</think>")[-1].strip()
        assert last in text

    check()


def test_a_think_block_of_the_answer_is_learnt_as_the_template_shows_it(write: Write) -> None:
    tokenizer = TOKENIZERS["think"]
    row = {"instruction": "3+2?", "input": "", "output": "<think>\nCount on.\n</think>\n\n5"}
    (encoded,) = rows_of(write, tokenizer, [row])
    messages = [{"role": "user", "content": "3+2?"}, {"role": "assistant", "content": row["output"]}]
    assert encoded.tokens.tolist() == rendered(tokenizer, messages)
    assert learnt(tokenizer, encoded) == "<think>\nCount on.\n</think>\n\n5<|im_end|>"


def test_earlier_turns_lose_their_think_blocks_as_in_the_template(write: Write) -> None:
    tokenizer = TOKENIZERS["think"]
    messages = [
        {"role": "user", "content": "3+2?"},
        {"role": "assistant", "content": "<think>\nCount on.\n</think>\n\nFive."},
        {"role": "user", "content": "And 1 more?"},
        {"role": "assistant", "content": "Six.", "reasoning_content": "After five."},
    ]
    (encoded,) = rows_of(write, tokenizer, [{"messages": messages}])
    assert encoded.tokens.tolist() == rendered(tokenizer, messages)
    assert learnt(tokenizer, encoded) == "Five.<|im_end|><think>\nAfter five.\n</think>\n\nSix.<|im_end|>"


def asked(*answers: str, **more: Any) -> dict[str, Any]:
    """A row of rounds with these answers."""
    rounds = [[{"role": "user", "content": "sky?"}, {"role": "assistant", "content": text}] for text in answers]
    rounds[-1][-1] |= more
    return {"messages": [message for both in rounds for message in both]}


BLOCK = "<think>\nhm\n</think>\n\nblue"


@pytest.mark.parametrize(
    ("template", "row", "expected"),
    [
        (THINK, asked("blue"), "<think>\n\n</think>\n\nblue<|im_end|>"),  # it has to generate the empty block
        (THINK, asked("red", "blue"), "red<|im_end|><think>\n\n</think>\n\nblue<|im_end|>"),
        (THINK, asked("<think>\n\n</think>\n\nblue"), "<think>\n\n</think>\n\nblue<|im_end|>"),
        (OPENED, asked(BLOCK), "hm\n</think>\n\nblue<|im_end|>"),
        (OPENED, asked("blue", reasoning_content="hm"), "hm\n</think>\n\nblue<|im_end|>"),
        (OPENED, asked("blue"), "\n</think>\n\nblue<|im_end|>"),
        (OPENED, asked(BLOCK, BLOCK), "blue<|im_end|>hm\n</think>\n\nblue<|im_end|>"),
        (DROPPED, asked("<think>\n\n</think>\n\nblue"), "\n\nblue<|im_end|>"),
        (ENDED, asked("red", "blue"), "red<|im_end|>blue<|im_end|>"),  # one end: what follows is never generated
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}{{ eos_token }}", asked("blue"), "blue\n</s>"),
    ],
)  # fmt: skip
def test_what_the_model_has_to_generate_is_learnt_and_nothing_else(
    write: Write, template: str, row: Any, expected: str
) -> None:
    tokenizer = build(template)
    (encoded,) = rows_of(write, tokenizer, [row])
    assert encoded.tokens.tolist() == rendered(tokenizer, row["messages"])
    assert learnt(tokenizer, encoded) == expected


def test_a_template_that_drops_the_reasoning_of_the_last_answer_is_refused(write: Write) -> None:
    tokenizer = build(DROPPED)
    assert len(rows_of(write, tokenizer, [asked(BLOCK, "blue")])) == 1  # of earlier answers it may
    with pytest.raises(DataError, match="line 2: the chat template drops the think block of the last answer"):
        rows_of(write, tokenizer, [asked("blue"), asked("red", BLOCK)])
    assert learnt(tokenizer, rows_of(write, tokenizer, [asked(BLOCK)], template="plain")[0]) == f"{BLOCK}</s>"


def test_a_template_that_asks_otherwise_than_it_shows_answers_is_told(
    write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    data = InstructionData(test=write("test.jsonl", [asked("red", "blue"), asked("blue")]))
    data.attach(build(DROPPED))
    data.scoring_rows("test")
    (record,) = caplog.records
    assert record.message.startswith(
        r"the chat template asks for an answer by '<|im_start|>assistant\n<think>\n', which"
    )
    assert "does not stand before the last answer of 2 rows" in record.message
    assert data.describe()["warnings"] == [record.message]


def test_what_a_template_marks_as_generated_is_what_is_learnt(write: Write) -> None:
    tokenizer = build(GENERATION)
    row = asked("The sky is blue.", "yes", "a\nb")
    (encoded,) = rows_of(write, tokenizer, [row])
    theirs = tokenizer.apply_chat_template(
        row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert encoded.tokens.tolist() == theirs["input_ids"]
    assert encoded.labelled.tolist() == [bool(mask) for mask in theirs["assistant_masks"]]


def test_calls_of_tools_are_learnt_and_tools_are_shown(write: Write) -> None:
    tokenizer = TOKENIZERS["tools"]
    messages = [
        {"role": "user", "content": "weather in town 3?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "12 degrees"},
        {"role": "assistant", "content": "It is 12 degrees."},
    ]
    for tools in ([TOOL], json.dumps([TOOL])):
        (encoded,) = rows_of(write, tokenizer, [{"messages": messages, "tools": tools}])
        assert encoded.tokens.tolist() == rendered(tokenizer, messages, [TOOL])
        calls, answer = learnt(tokenizer, encoded).split("<|im_end|>")[:2]
        assert calls.startswith("<tool_call>[{")
        assert answer == "It is 12 degrees."


def test_an_answer_of_weight_0_is_seen_and_not_learnt(write: Write) -> None:
    tokenizer = TOKENIZERS["chatml"]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "3+2?"},
        {"role": "assistant", "content": "Six.", "weight": 0},
        {"role": "user", "content": "No."},
        {"role": "assistant", "content": "Five.", "weight": 1},
    ]
    (encoded,) = rows_of(write, tokenizer, [{"messages": messages}])
    assert encoded.tokens.tolist() == rendered(tokenizer, messages)
    assert learnt(tokenizer, encoded) == "Five.<|im_end|>"
    (plain,) = rows_of(write, ENDING, [{"messages": messages}])
    assert learnt(ENDING, plain) == "Five.</s>"


def test_columns_system_and_history_come_before_the_question(write: Write) -> None:
    row = {"instruction": "And 1 more?", "output": "Six.", "system": "Be brief.", "history": [["3+2?", "Five."]]}
    tokenizer = TOKENIZERS["chatml"]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "3+2?"},
        {"role": "assistant", "content": "Five."},
        {"role": "user", "content": "And 1 more?"},
        {"role": "assistant", "content": "Six."},
    ]
    (encoded,) = rows_of(write, tokenizer, [row])
    assert encoded.tokens.tolist() == rendered(tokenizer, messages)
    assert learnt(tokenizer, encoded) == "Five.<|im_end|>Six.<|im_end|>"
    (plain,) = rows_of(write, ENDING, [row])
    text = ENDING.decode(plain.tokens)
    assert "Be brief.\n\n3+2?" in text
    assert learnt(ENDING, plain) == "Five.</s>Six.</s>"
    (joined,) = rows_of(write, tokenizer, [{"messages": messages[1:], "system": "Be brief."}])
    assert joined.tokens.tolist() == encoded.tokens.tolist()


ASKED = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [ASKED, ANSWER], "tools": [TOOL]}, "the chat template leaves out 'tools'"),
        ({"messages": [ASKED, {**ANSWER, "tool_calls": [CALL]}]}, "the chat template leaves out 'tool_calls'"),
        ({"messages": [ASKED, {**ANSWER, "reasoning_content": "r"}]}, "leaves out 'reasoning_content'"),
        ({"messages": [ASKED, {**ANSWER, "content": None, "tool_calls": [CALL]}]}, "leaves out 'tool_calls'"),
        ({"messages": [ASKED, {**ANSWER, "content": None}]}, "the row has a message without"),
        ({"messages": [ASKED, {**ANSWER, "weight": 0.5}]}, "the row gives a message of the assistant the weight 0.5"),
        ({"messages": [{**ASKED, "weight": 1}, ANSWER]}, "the row gives a message of the user the weight 1"),
        ({"messages": [ASKED, {**ANSWER, "weight": 0}]}, "the row gives every message of the assistant the weight 0"),
        ({"messages": [ASKED, {**ANSWER, "train": False}]}, "the row has a message with 'train'"),
        ({"messages": [ASKED, ANSWER], "history": [["a", "b"]]}, "the row has a `history` beside messages"),
        ({"messages": [ASKED, ANSWER], "functions": [TOOL]}, "the row has a field 'functions'"),
        ({"messages": [ASKED, ANSWER], "tools": "weather"}, "the row needs `tools` as a list"),
        (
            {"messages": [{"role": "system", "content": "s"}, ASKED, ANSWER], "system": "t"},
            "the row has a field 'system'",
        ),
        ({"instruction": "a", "output": "b", "history": "x"}, "the row needs `history` as a list"),
        ({"instruction": "a", "output": "b", "images": ["x.png"]}, "the row has a field 'images'"),
    ],
)
def test_what_would_be_lost_is_refused_with_file_and_line(write: Write, row: Any, message: str) -> None:
    with pytest.raises(
        DataError, match=f"test.jsonl, line 1: {message}|test.jsonl, line 1: the chat template {message}"
    ):
        rows_of(write, TOKENIZERS["chatml"], [row])


@pytest.mark.parametrize("template", ["alpaca", "plain"])
def test_forms_of_ours_refuse_what_they_cannot_show(write: Write, template: Any) -> None:
    with pytest.raises(DataError, match=f"line 1: template {template} has no place for 'tools'"):
        rows_of(write, ENDING, [{"messages": [ASKED, ANSWER], "tools": [TOOL]}], template=template)


def test_a_null_content_beside_calls_of_tools_is_left_to_the_template(write: Write) -> None:
    tokenizer = TOKENIZERS["tools"]
    messages = [ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    (encoded,) = rows_of(write, tokenizer, [{"messages": messages}])
    assert encoded.tokens.tolist() == rendered(tokenizer, messages)


def test_an_answer_that_the_template_drops_is_refused(write: Write) -> None:
    tokenizer = build(
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    with pytest.raises(DataError, match="line 1: the chat template drops an answer"):
        rows_of(write, tokenizer, [{"messages": [ASKED, ANSWER]}])


def test_the_end_of_an_answer_is_learnt_behind_white_space_too(write: Write) -> None:
    tokenizer = TOKENIZERS["spaced"]
    (encoded,) = rows_of(write, tokenizer, [{"messages": [ASKED, ANSWER, ASKED, ANSWER]}])
    assert encoded.tokens.tolist() == rendered(tokenizer, [ASKED, ANSWER, ASKED, ANSWER])
    assert learnt(tokenizer, encoded).replace(" ", "") == "b</s>b</s>"


def test_answers_that_a_template_leaves_open_are_told(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = build("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    messages = [ASKED, {**ANSWER, "id": "m1"}]
    with caplog.at_level(logging.WARNING):
        (encoded,) = rows_of(write, tokenizer, [{"messages": messages}])
    assert encoded.tokens.tolist() == rendered(tokenizer, messages)
    assert learnt(tokenizer, encoded).strip() == "b"
    assert [record.message for record in caplog.records] == [
        "fields of messages that the chat template does not use: id",
        "the chat template puts no special token behind an answer of 1 rows: there the model does not learn to stop",
    ]


@pytest.mark.parametrize("fast", [True, False])
def test_a_tokenizer_that_ends_texts_learns_one_end_behind_the_answer(
    write: Write, monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    monkeypatch.setattr(type(ENDING), "is_fast", fast)
    for template in ("alpaca", "plain"):
        (encoded,) = rows_of(write, ENDING, [{"instruction": "sky?", "output": "blue"}], template=template)
        assert encoded.tokens.tolist().count(1) == 1
        assert encoded.tokens[0] == 0
        assert learnt(ENDING, encoded) == "blue</s>"


def test_a_choice_keeps_its_first_token_with_a_tokenizer_that_ends_texts(write: Write) -> None:
    row = {"context": "sky?", "question": "", "choices": ["blue", "yes"], "label": 0}
    data = MultipleChoiceData(test=write("test.jsonl", [row]))
    data.attach(ENDING)
    assert [learnt(ENDING, encoded) for encoded in data.scoring_rows("test")] == [" blue", " yes"]
    assert all(encoded.tokens.tolist().count(1) == 0 for encoded in data.scoring_rows("test"))


def test_rows_are_told_apart_by_what_they_say_beside_their_texts(write: Write) -> None:
    plain = {"messages": [ASKED, ANSWER]}
    told = [{**plain, "tools": [TOOL]}, {"messages": [ASKED, {**ANSWER, "reasoning_content": "r"}]},
            {"messages": [ASKED, ANSWER, ASKED, {**ANSWER, "weight": 0}]}]  # fmt: skip
    rows = [plain, {"instruction": "a", "output": "b"}, {"messages": [ASKED, ANSWER, ASKED, ANSWER]}, *told]
    keys = [item.key for item in InstructionData(test=write("test.jsonl", rows)).items("test")]
    assert len(set(keys)) == len(rows)
    # The key of a row that says nothing else is that of its texts alone: digests of such data stay as they were.
    assert keys[0] == content_key(((), (("user", "a"), ("assistant", "b"))))
    assert keys[1] == content_key((("a", ""), (("user", "a"), ("assistant", "b"))))


@pytest.mark.parametrize("kind", ["chatml", "spaced"])
def test_pieces_are_found_without_character_offsets_too(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = TOKENIZERS[kind]
    pieces = [("<|im_start|>user\nthe sky", False), (" is blue.", True), ("", True), ("<|im_end|>\nyes", False)]
    expected = encode_pieces(tokenizer, pieces, special=False)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    assert encode_pieces(tokenizer, pieces, special=False) == expected
