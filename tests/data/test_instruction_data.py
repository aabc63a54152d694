from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qratk.core import DataError
from qratk.data import InstructionData
from qratk.data.encoding import Encoded
from qratk.data.instruction import ALPACA_INPUT, ALPACA_NO_INPUT

Write = Callable[[str, list[Any]], str]

ALPACA = [
    {"instruction": "What is the colour of the sky?", "input": "", "output": "Blue."},
    {"instruction": "Add the numbers.", "input": "2 and 2", "output": "It is four,\nas is known."},
    {"instruction": "Which animal barks?", "input": "", "output": "The dog \u00e9 barks."},
]
CHAT = [
    {"role": "system", "content": "Answer the question."},
    {"role": "user", "content": "Which animal barks?"},
    {"role": "assistant", "content": "The dog barks."},
    {"role": "user", "content": "And the colour of the sky?"},
    {"role": "assistant", "content": "Blue, blue."},
]


def make(write: Write, tokenizer: Any, rows: list[Any], **options: Any) -> InstructionData:
    data = InstructionData(test=write("test.jsonl", rows), **options)
    data.attach(tokenizer)
    return data


def learnt(tokenizer: Any, row: Encoded) -> str:
    return tokenizer.decode(row.tokens[row.labelled])


def whole(tokenizer: Any, row: Encoded) -> str:
    return tokenizer.decode(row.tokens)


def test_alpaca_rows_learn_the_answer_and_its_end_only(write: Write, tokenizer: Any) -> None:
    rows = make(write, tokenizer, ALPACA).scoring_rows("test")
    assert [learnt(tokenizer, row) for row in rows] == [f"{row['output']}</s>" for row in ALPACA]


def test_alpaca_rows_are_the_alpaca_prompt_with_its_answer(write: Write, tokenizer: Any) -> None:
    rows = make(write, tokenizer, ALPACA).scoring_rows("test")
    assert whole(tokenizer, rows[0]) == f"<s>{ALPACA_NO_INPUT.format(**ALPACA[0])}Blue.</s>"
    assert whole(tokenizer, rows[1]) == f"<s>{ALPACA_INPUT.format(**ALPACA[1])}{ALPACA[1]['output']}</s>"


def test_every_assistant_turn_of_a_chat_is_learnt_and_nothing_else(write: Write, chat_tokenizer: Any) -> None:
    (row,) = make(write, chat_tokenizer, [{"messages": CHAT}]).scoring_rows("test")
    assert learnt(chat_tokenizer, row) == "The dog barks.<|end|>Blue, blue.<|end|>"
    assert row.tokens.tolist() == chat_tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=False)


def test_alpaca_rows_go_through_the_chat_template_where_there_is_one(write: Write, chat_tokenizer: Any) -> None:
    row = make(write, chat_tokenizer, ALPACA).scoring_rows("test")[1]
    assert whole(chat_tokenizer, row) == (
        "<|turn|>user\nAdd the numbers.\n\n2 and 2<|end|>\n<|turn|>assistant\nIt is four,\nas is known.<|end|>\n"
    )
    assert learnt(chat_tokenizer, row) == "It is four,\nas is known.<|end|>"


@pytest.mark.parametrize("template", ["alpaca", "plain"])
def test_multi_turn_rows_without_a_chat_template_learn_all_answers(write: Write, tokenizer: Any, template: Any) -> None:
    (row,) = make(write, tokenizer, [{"messages": CHAT}], template=template).scoring_rows("test")
    assert learnt(tokenizer, row) == "The dog barks.</s>Blue, blue.</s>"
    assert "And the colour of the sky?" in whole(tokenizer, row)


def test_plain_rows_are_the_bare_texts(write: Write, tokenizer: Any) -> None:
    row = make(write, tokenizer, ALPACA, template="plain").scoring_rows("test")[0]
    assert whole(tokenizer, row) == "<s>What is the colour of the sky?\nBlue.</s>"


def test_a_tokenizer_without_offsets_gives_the_same_labels(
    write: Write, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = [learnt(tokenizer, row) for row in make(write, tokenizer, ALPACA).scoring_rows("test")]
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    slow = [learnt(tokenizer, row) for row in make(write, tokenizer, ALPACA).scoring_rows("test")]
    assert slow == fast


@pytest.mark.parametrize("limit", [8, 20, 40, 80])
def test_truncation_keeps_as_much_answer_as_can_be_kept(write: Write, tokenizer: Any, limit: int) -> None:
    (full,) = make(write, tokenizer, ALPACA[1:2]).scoring_rows("test")
    data = make(write, tokenizer, ALPACA[1:2], max_length=limit)
    (row,) = data.scoring_rows("test")
    assert len(row.tokens) == limit
    assert row.tokens[0] == tokenizer.bos_token_id
    assert row.labelled.sum() == min(full.labelled.sum(), limit - 1)
    assert data.describe()["test"]["truncated"] == 1
    # What is left is one stretch of the whole row, and the answer's beginning is not lost.
    text = full.tokens[1:].tolist()
    first = next(k for k in range(len(text)) if text[k : k + limit - 1] == row.tokens[1:].tolist())
    assert first + row.labelled[1:].argmax() == full.labelled[1:].argmax()


def test_score_is_minus_nats_per_answer_token(write: Write, tokenizer: Any, model: Any, scored: Any) -> None:
    data = make(write, tokenizer, ALPACA, eval_batch_size=2)
    scorer = scored(data, model)
    total, count, means = 0.0, 0, []
    for row in data.scoring_rows("test"):
        ids = torch.from_numpy(row.tokens)[None].long()
        with torch.no_grad():
            log_p = model(input_ids=ids).logits[0].double().log_softmax(-1)
        values = [float(log_p[k - 1, ids[0, k]]) for k in range(1, ids.shape[1]) if row.labelled[k]]
        total, count = total + sum(values), count + len(values)
        means.append(sum(values) / len(values))
    assert float(scorer.compute()["score"]) == pytest.approx(total / count, rel=1e-5)
    assert scorer.outcomes().tolist() == pytest.approx(means, rel=1e-5)
    assert sum(data.item_weights("test")) == count


def test_item_weights_times_outcomes_give_the_score(write: Write, tokenizer: Any, model: Any, scored: Any) -> None:
    data = make(write, tokenizer, ALPACA)
    scorer = scored(data, model)
    weights = torch.tensor(data.item_weights("test"), dtype=torch.float64)
    mean = (weights * scorer.outcomes()).sum() / weights.sum()
    assert float(mean) == pytest.approx(float(scorer.compute()["score"]), rel=1e-12)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"instruction": "a"},
            r"line 2: the row has only 'instruction'; it needs those of a form: alpaca \(instruction, ",
        ),
        ({"instruction": "a", "output": 3}, "line 2: the row needs a text field 'output'"),
        ({"instruction": 3, "output": "b"}, "line 2: the row needs a text field 'instruction'"),
        ({"messages": []}, "line 2: the row needs `messages`"),
        ({"messages": [{"role": "user", "content": "a"}]}, "line 2: the row has no message of the assistant"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "line 2: the row has a message without a role"),
    ],
)
def test_bad_rows_are_named_with_file_and_line(write: Write, tokenizer: Any, row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make(write, tokenizer, [ALPACA[0], row]).items("test")


def test_a_chat_template_that_is_asked_for_must_exist(write: Write, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="no chat template"):
        make(write, tokenizer, ALPACA, template="chat").scoring_rows("test")


def test_a_chat_template_that_rejects_the_roles_is_reported_with_the_line(write: Write, chat_tokenizer: Any) -> None:
    template = chat_tokenizer.chat_template
    try:
        chat_tokenizer.chat_template = "{{ raise_exception('no system message') }}"
        with pytest.raises(DataError, match=r"line 1: the chat template rejects the messages: no system"):
            make(write, chat_tokenizer, [{"messages": CHAT}]).scoring_rows("test")
    finally:
        chat_tokenizer.chat_template = template
