"""Rows, options and templates that a user can get wrong end in one DataError that names file and row."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jinja2 import Environment, StrictUndefined

from qratk.core import DataError
from qratk.data import InstructionData, MultipleChoiceData, TextData
from qratk.data.prompt import Prompt

Write = Callable[[str, list[Any]], str]

CHOICE = {"context": "a", "question": "b", "choices": ["one", "two"], "label": 0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (r'{"text": "nice \ud83d"}', r"line 2: the row holds '\\ud83d', half of a surrogate pair"),
        ('{"text": ' + "[" * 5000 + "]" * 5000 + "}", "line 2: nested too deeply"),
        ('{"text": "a", "n": ' + "7" * 5000 + "}", "line 2: cannot be read .*digits"),
        ('{"text": ' + "[" * 300 + "]" * 300 + "}", "line 2: the row needs a text field 'text', but there it holds"),
    ],
    ids=["surrogate", "nested", "digits", "nested list in a message"],
)
def test_rows_that_json_allows_and_nobody_can_read_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "red"}\n' + text + "\n")
    with pytest.raises(DataError, match=message):
        TextData(test=str(path)).items("test")


@pytest.mark.parametrize("text", ["[" * 5000 + "]" * 5000, '[{"n": ' + "7" * 5000 + "}]"])
def test_lists_that_cannot_be_read_are_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"rows\.json: (nested|cannot be read)"):
        TextData(test=str(path)).items("test")


@pytest.mark.parametrize("kind", [InstructionData, MultipleChoiceData])
def test_half_a_surrogate_pair_is_found_in_every_kind_of_row(write: Write, kind: Any) -> None:
    answer = {"instruction": "Be nice", "output": "nice \ud83d"}
    row = answer if kind is InstructionData else {**CHOICE, "choices": ["one", "two \ud83d"]}
    with pytest.raises(DataError, match=r"line 1: the row holds .* half of a surrogate pair"):
        kind(test=write("test.jsonl", [row])).items("test")


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".txt"])
def test_a_byte_order_mark_is_no_part_of_the_rows(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(b"\xef\xbb\xbf" + (b"red" if suffix == ".txt" else b'{"text": "red"}'))
    assert [item.content for item in TextData(test=str(path)).items("test")] == ["red"]


def test_files_with_byte_order_marks_may_be_joined(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "red"}\n\xef\xbb\xbf{"text": "blue"}\n')
    assert [item.content for item in TextData(test=str(path)).items("test")] == ["red", "blue"]


@pytest.mark.parametrize("name", ["a\0b.jsonl", "x" * 5000 + ".jsonl", "~nobody-of-this-name/rows.jsonl"])
def test_names_that_no_file_can_have_are_refused(name: str) -> None:
    with pytest.raises(DataError, match="test data: "):
        TextData(test=name).items("test")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("{{ 1/0 }}", "ZeroDivisionError: division by zero"),
        ("{{ context + 1 }}", "TypeError"),
        ("{% for i in range(10**9) %}{% endfor %}", "OverflowError: Range too big"),
        ("{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}", "more than 100,000 steps"),
        ("{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(90) }}", "100,000 steps"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ 9 ** (9 ** 9) }}", "a power in it is too large"),
        ("{{ 'a' * 10**10 }}", "a product in it is too large"),
        ("{{ nothing }}", "'nothing' is undefined"),
    ],
)
def test_a_prompt_that_fails_on_a_row_names_it(write: Write, prompt: str, message: str) -> None:
    data = MultipleChoiceData(test=write("test.jsonl", [CHOICE]), prompt=prompt)
    with pytest.raises(DataError, match=f"line 1: the row does not fit the prompt template: .*{message}"):
        data.items("test")


@pytest.mark.parametrize(
    "expression",
    [
        "'a'.ljust(n)", "'a'|center(n)", "'a'.zfill(n)", "'%999999999d' % 1", "'%*d' % (n, 1)",
        "'%999999999d'|format(1)",
        "'{:>999999999}'.format(1)", "'{:>{w}}'.format(1, w=n)", "'{w:>{w}}'.format_map({'w': n})",
        "('a' * 99999).replace('a', 'b' * 99999)", "('a' * 99999)|replace('a', 'b' * 99999)",
        "range(99999)|join('b' * 99)",
        "('b' * 99).join(choices * 99999)", "choices|tojson(indent=n)", "'a'|indent(n)", "'\t'.expandtabs(n)",
        "choices|batch(n, 'x')|list", "choices|slice(n)|list", "1.5|round(n)", "choices|map('center', n)|list",
        "'a'|attr('ljust')(n)", "n.to_bytes(n)",
    ],
)  # fmt: skip
def test_a_prompt_makes_no_text_that_is_too_large(write: Write, expression: str) -> None:
    data = MultipleChoiceData(test=write("test.jsonl", [{**CHOICE, "n": 10**9}]), prompt=f"{{{{ {expression} }}}}")
    with pytest.raises(DataError, match=r"line 1: the row does not fit the prompt template: .* in it is too large"):
        data.items("test")


@pytest.mark.parametrize(
    "doubled",
    [
        "{% set ns.x = ns.x ~ ns.x %}", "{% set ns.x = ns.x + ns.x %}", "{% set ns.x = [ns.x, ns.x]|join %}",
        "{% set ns.x = '%s%s' % (ns.x, ns.x) %}", "{% set ns.x = '{}{}'.format(ns.x, ns.x) %}",
        "{% set x %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = x %}", "{% set ns.x = twice(ns.x) %}",
        "{% set ns.x = [ns.x, ns.x] %}",
    ],
)  # fmt: skip
def test_a_prompt_doubles_no_text_for_ever(write: Write, doubled: str) -> None:
    macro = "{% macro twice(x) %}{{ x }}{{ x }}{% endmacro %}{% set ns = namespace(x='ab') %}"
    prompt = f"{macro}{{% for i in range(60) %}}{doubled}{{% endfor %}}{{{{ ns.x }}}}"
    with pytest.raises(DataError, match="in it is too large"):
        MultipleChoiceData(test=write("test.jsonl", [CHOICE]), prompt=prompt).items("test")


def test_what_a_prompt_makes_is_what_jinja_makes() -> None:
    row = {**CHOICE, "n": 10**9, "long": "word one " * 20_000}
    prompt = (
        "{{ 'a' ~ context ~ n ~ choices }} {{ '%s and %d' % (context, 3) }} {{ '{} {:>5}'.format(context, n) }} "
        "{{ n % 7 }} {{ choices|join(', ') }} {{ ', '.join(choices) }} {{ choices|map('upper')|list }} "
        "{{ choices|tojson(indent=2) }} "
        "{{ (long|replace('word', 'another')).split(' ')|join(', ')|length }} {{ long|wordwrap(20)|indent(4) }} "
        "{{ 1.25|round(1) }} {{ nothing|default(n) }} {{ context|center(9) }} {{ [choices] * 2 }} {{ 2 ** 10 }}"
    )
    expected = Environment(undefined=StrictUndefined).from_string(prompt).render(row)
    assert Prompt(prompt).render(row) == expected


def test_loops_of_a_prompt_are_those_of_jinja(write: Write) -> None:
    prompt = "{% for c in choices if c != 'two' %}{{ loop.index }}/{{ loop.length }} {{ c }}{% else %}none{% endfor %}"
    data = MultipleChoiceData(test=write("test.jsonl", [CHOICE, {**CHOICE, "choices": ["red", "two"]}]), prompt=prompt)
    assert [item.content[0] for item in data.items("test")] == ["1/1 one", "1/1 red"]


def test_a_row_may_have_a_field_named_self(write: Write) -> None:
    data = MultipleChoiceData(test=write("test.jsonl", [{**CHOICE, "self": "s", "args": 1, "kwargs": 2}]))
    assert data.items("test")[0].content[0] == "a\nb"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"choices": {"text": ["a", "b"], "label": ["A", "B", "C"]}, "label": "C"}, "has 2 choices with the labels"),
        ({"choices": {"text": ["a", "b"], "label": ["A"]}, "label": "A"}, "has 2 choices with the labels"),
        ({"choices": {"text": ["a", "b"], "label": ["A", "A"]}, "label": "A"}, "has a label twice"),
        ({"choices": {"text": ["a", "b"], "label": ["A", None]}, "label": "A"}, ".*give one text or number for each"),
        ({"choices": {"text": ["a", "b"], "label": [0, 1]}, "label": True}, "needs `label`, one of"),
        ({"choices": ["one", "one"]}, "has a choice twice"),
        ({"choices": ["one", " \n"]}, "has a choice that is empty"),
    ],
)
def test_choices_that_cannot_be_told_apart_are_refused(write: Write, changed: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"line 2: the row {message}"):
        MultipleChoiceData(test=write("test.jsonl", [CHOICE, {**CHOICE, **changed}])).items("test")


def test_a_batch_far_larger_than_the_data_is_refused(write: Write, tokenizer: Any) -> None:
    rows = [{"text": f"red {k}"} for k in range(10)]
    data = TextData(write("train.jsonl", rows), packing=False, batch_size=60_000)
    data.attach(tokenizer)
    with pytest.raises(DataError, match="batch_size is 60000, but there are 9 training rows"):
        data.setup("fit")


def test_fewer_than_no_workers_are_refused() -> None:
    with pytest.raises(DataError, match="num_workers must be at least 0, got -1"):
        TextData("train.jsonl", num_workers=-1)


def test_fields_that_are_not_used_are_told_once(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{**CHOICE, "id": str(k), "question": f"b {k}", "subject": "x", "mine": 1} for k in range(3)]
    data = MultipleChoiceData(
        write("train.jsonl", rows), test=write("test.jsonl", rows[:1]), prompt="{{ subject }} {{ question }}",
        rename={"context": "mine"}, validation_items=1,
    )  # fmt: skip
    with pytest.raises(DataError, match="needs a text field 'context'"):
        data.items("train")
    data = MultipleChoiceData(
        write("train.jsonl", rows), test=write("test.jsonl", rows[:1]), prompt="{{ subject }} {{ question }}",
        validation_items=1,
    )  # fmt: skip
    data.items("train")
    data.items("test")
    assert [record.message for record in caplog.records] == ["fields of the rows that are not used: 'mine'"]


def test_an_error_within_the_modules_tokenizer_is_not_hidden(write: Write) -> None:
    from types import SimpleNamespace

    from torch import nn

    class Module(nn.Module):
        @property
        def tokenizer(self) -> Any:
            raise AttributeError("'Linear' object has no attribute 'base_layer'")

    data = TextData(test=write("test.jsonl", [{"text": "red"}]))
    data.trainer = SimpleNamespace(lightning_module=Module())  # type: ignore[assignment]
    with pytest.raises(AttributeError, match="base_layer"):
        _ = data.tokenizer


def test_json_of_the_rows_is_what_was_written(write: Write) -> None:
    text = "\u2028 line separator, \U0001f600 and a null \x00"
    path = write("test.jsonl", [{"text": text}])
    assert json.loads(Path(path).read_text())["text"] == text == TextData(test=path).items("test")[0].content
