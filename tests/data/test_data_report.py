"""What rows come to: lengths, what is cut, what is learnt, and rows in pieces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from qratk.core import DataError
from qratk.data import InstructionData, MultipleChoiceData, TextData
from qratk.data.report import DataReport, Piece, Spread, prompt_of
from qratk.data.suite import SuiteData
from qratk.data.suite_members import SuiteTask, TrainingSource

Write = Callable[[str, list[Any]], str]

ROWS = [{"instruction": f"two {k}", "output": " ".join(["yes, the dog barks."] * k)} for k in range(1, 12)]
CHOICE = {"context": "hello", "question": "sky?", "choices": ["red", "blue blue", "green"], "label": 1}


def report_of(data: Any, tokenizer: Any) -> DataReport:
    data.attach(tokenizer)
    return DataReport(data)


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [([3], (3, 3, 3, 3)), ([4, 1], (1, 1, 4, 4)), (range(1, 101), (1, 50, 95, 100)), (range(20), (0, 9, 18, 19))],
)
def test_percentiles_are_numbers_that_occur(numbers: Any, expected: Any) -> None:
    assert Spread.of(list(numbers)) == Spread(*expected)


def test_figures_of_rows_that_fit_are_those_of_their_tokens(write: Write, chat_tokenizer: Any) -> None:
    report = report_of(InstructionData(write("train.jsonl", ROWS), validation_items=2), chat_tokenizer)
    texts = [row["output"] + "<|end|>" for row in ROWS]
    tokens = [len(chat_tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    train, held_out = report.figures()["train"], report.figures()["validation"]
    assert train.all_learnt + held_out.all_learnt == sum(tokens)
    assert (train.items, train.rows, train.cut, train.learnt_cut_off, train.without) == (9, 9, 0, 0.0, 0)
    assert (held_out.items, held_out.held_out, train.held_out) == (2, True, False)
    assert train.forms == {"alpaca": 9}
    assert train.ends == {"<|end|>": 9}
    assert list(train.sources) == list(held_out.sources) == [report._data.sources["train"]]
    assert train.all_tokens > train.all_learnt


@pytest.mark.parametrize("limit", [40, 70, 90])
def test_share_that_is_cut_off_is_that_of_the_rows_without_a_limit(
    write: Write, chat_tokenizer: Any, limit: int
) -> None:
    path = write("test.jsonl", ROWS)
    whole = report_of(InstructionData(test=path), chat_tokenizer).figures()["test"]
    short = report_of(InstructionData(test=path, max_length=limit), chat_tokenizer).figures()["test"]
    assert short.tokens.most == limit < whole.tokens.most
    assert 0 < short.cut < len(ROWS)
    assert short.learnt_cut_off == pytest.approx(1 - short.all_learnt / whole.all_learnt)
    assert short.ends["<|end|>"] == len(ROWS) - short.ends.get("", 0)


def test_training_rows_without_anything_to_learn_are_counted(write: Write, tokenizer: Any) -> None:
    class FirstUnlearnt(InstructionData):
        def encode_training(self, items: Any) -> Any:
            for row in super().encode_training(items):
                row.labelled[:] &= row.item > 0
                yield row

    report = report_of(FirstUnlearnt(write("train.jsonl", ROWS), validation_items=1), tokenizer)
    assert (report.figures()["train"].items, report.figures()["train"].rows, report.figures()["train"].without) == (
        10,
        9,
        1,
    )


def test_pieces_join_to_the_text_and_say_what_is_learnt(write: Write, chat_tokenizer: Any) -> None:
    row = {"instruction": "Say \u00e9", "output": "\u00e9\U0001f600 yes\n"}
    data = InstructionData(test=write("test.jsonl", [row]))
    ((shown,),) = ((item.rows) for item in report_of(data, chat_tokenizer).examples("test", 3)["test"])
    (encoded,) = data.scoring_rows("test")
    assert "".join(piece.text for piece in shown.pieces) == chat_tokenizer.decode(encoded.tokens)
    learnt = [piece for piece in shown.pieces if piece.learnt]
    assert learnt == [Piece("\u00e9\U0001f600 yes", True, False), Piece("<|end|>", True, True)]
    assert shown.learnt == encoded.labelled.sum()
    assert shown.pieces[0] == Piece("<|turn|>", False, True)


def test_choices_are_shown_as_scored_behind_their_prompt(write: Write, tokenizer: Any) -> None:
    path = write("rows.jsonl", [{**CHOICE, "context": "two"}, {**CHOICE, "context": "one", "label": 0}])
    report = report_of(MultipleChoiceData(path, test=write("test.jsonl", [CHOICE]), validation_items=1), tokenizer)
    (item,) = report.examples("test", 5)["test"]
    assert [row.right for row in item.rows] == [False, True, False]
    prompt = prompt_of(item.rows)
    assert "".join(piece.text for piece in prompt) == "<s>hello\nsky?"
    assert ["".join(p.text for p in row.pieces[len(prompt) :]) for row in item.rows] == [" red", " blue blue", " green"]
    (trained,) = report.examples("train", 5)["train"]
    assert [row.right for row in trained.rows] == [None]
    assert report.figures()["test"].rows == 3


def test_choices_around_a_blank_have_no_prompt_in_common(write: Write, tokenizer: Any) -> None:
    row = {"context": "", "question": "The _ barks two times.", "choices": ["dog", "sky"], "label": 0}
    (item,) = report_of(MultipleChoiceData(test=write("test.jsonl", [row])), tokenizer).examples("test", 1)["test"]
    assert prompt_of(item.rows) == ()
    assert ["".join(p.text for p in row.pieces if p.learnt) for row in item.rows] == [" barks two times."] * 2


def test_windows_of_a_text_are_rows_of_their_own(write: Write, tokenizer: Any) -> None:
    texts = [{"text": f"{number} one two three " * 30} for number in range(3)]
    data = TextData(write("a.jsonl", texts[1:]), test=write("b.jsonl", texts[:1]), max_length=50, validation_items=1)
    report = report_of(data, tokenizer)
    shown = report.examples("test", 2)["test"]
    assert len(shown) == 2
    assert all(len(item.rows) == 1 and item.where.endswith("line 1") for item in shown)
    assert report.examples("train", 1)["train"][0].where == "rows joined"
    assert report.figures()["test"].cut == 0


def test_figures_of_all_splits_are_plain_data(write: Write, tokenizer: Any) -> None:
    report = report_of(MultipleChoiceData(test=write("t.jsonl", [{**CHOICE, "extra": 1}])), tokenizer)
    document = report.as_dict()
    assert list(document["parts"]) == ["test"]
    assert document["parts"]["test"]["tokens"]["least"] == report.figures()["test"].tokens.least
    assert document["notes"] == ["fields of the rows that are not used: 'extra'"]
    assert (document["class"], document["end_of_sequence"]) == ("MultipleChoiceData", "</s>")


def test_rows_that_cannot_be_read_end_in_their_own_error(write: Write, tokenizer: Any) -> None:
    data = MultipleChoiceData(test=write("t.jsonl", [CHOICE, {**CHOICE, "label": 7}]))
    with pytest.raises(DataError, match="line 2: the row needs `label`, an index"):
        report_of(data, tokenizer)


def test_a_suite_is_told_source_by_source_and_task_by_task(write: Write, chat_tokenizer: Any) -> None:
    texts = [{"text": f"{k} one two three " * 8} for k in range(4)]
    long, choices = write("long.jsonl", ROWS), write("choices.jsonl", [CHOICE, {**CHOICE, "context": "one"}])
    suite = SuiteData(
        [TrainingSource(InstructionData(long)), TrainingSource(TextData(write("texts.jsonl", texts)))],
        validation={"sky": SuiteTask(MultipleChoiceData(validation=choices))},
        max_length=60,
    )
    report = report_of(suite, chat_tokenizer)
    figures = report.figures()
    assert list(figures) == ["train[0]", "train[1]", "validation.sky"]
    assert [part.split for part in figures.values()] == ["train", "train", "validation"]
    assert [part.forms for part in figures.values()] == [{"alpaca": 11}, {"text": 4}, {"choices": 2}]
    alone = report_of(InstructionData(test=long, max_length=60), chat_tokenizer).figures()["test"]
    assert 0 < figures["train[0]"].learnt_cut_off == alone.learnt_cut_off
    assert figures["train[0]"].all_learnt == alone.all_learnt
    assert sum(part.rows for name, part in figures.items() if name != "validation.sky") == len(suite.training_rows())
    shown = report.examples("train", 1)
    assert [items[0].where.rpartition("/")[2] for items in shown.values()] == ["long.jsonl, line 1", "rows joined"]
    assert [row.right for row in report.examples("validation", 1)["validation.sky"][0].rows] == [False, True, False]
    assert report.as_dict()["notes"] == report.notes


def test_errors_of_a_suite_name_the_part(write: Write, chat_tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [{"id": 1}]}]
    data = InstructionData(write("calls.jsonl", [{"messages": messages}]))
    report = report_of(SuiteData([TrainingSource(data)]), chat_tokenizer)
    with pytest.raises(DataError, match=r"train\[0\]: .*calls.jsonl, line 1: the chat template leaves out"):
        report.figures()
