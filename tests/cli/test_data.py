"""`qratk data` tells what rows come to, of any data module, and loads no weights."""

from __future__ import annotations

import io
import json
import logging
import re
import sys

import pytest
import yaml

from qratk.__main__ import main
from qratk.cli.data import Style, colours, print_text
from qratk.data.report import Piece

SETTINGS = {
    "model": {"model": "embedded"},
    "data": {
        "class_path": "EmbeddedData",
        "init_args": {"max_train_items": 12, "max_validation_items": 3, "max_test_items": 3},
    },
}
THIRD_PARTY = """
from qratk.data import TextData
from qratk.data.encoding import encoded


class Backwards(TextData):
    '''Texts that are learnt from their end, by a module that knows only what every task must say.'''

    def __init__(self, train=None, **kwargs):
        super().__init__(train, **kwargs)

    def parse(self, row):
        return row.text("line")[::-1]

    def fields_used(self):
        return frozenset(("line",))

    def encode_training(self, items):
        for index, item in enumerate(items):
            ids = self.tokenizer(item.content)["input_ids"]
            yield encoded(ids[: self.max_length], [True] * len(ids[: self.max_length]), item=index)
"""


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.delitem(sys.modules, "mine", raising=False)


@pytest.fixture(autouse=True)
def _no_weights_are_loaded(monkeypatch):
    from qratk.training.module import FineTuneModule

    def loaded(self, **options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(FineTuneModule, "load_backbone", loaded)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump(SETTINGS))
    return str(path)


def shown(capsys, *arguments):
    """What the command prints."""
    capsys.readouterr()
    assert main(["data", *arguments]) == 0
    return capsys.readouterr().out


def rows(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def instructions(tmp_path, *given):
    return ["--model.model=embedded", "--data=InstructionData", f"--data.test={rows(tmp_path, *given)}"]


def test_figures_of_every_split_and_rows_of_the_first(capsys, config):
    text = shown(capsys, "--config", config, "--rows=2")
    assert re.search(r"^ +train +validation +test$", text, re.M)
    assert re.search(r"^items +12 +3 +3$", text, re.M)
    assert re.search(r"^forms +choices +choices +choices$", text, re.M)
    assert re.search(r"^rows +12 +12 +12$", text, re.M)
    assert len(re.findall(r"^train: .*, line \d+ \(\d+ tokens, 1 learnt\)$", text, re.M)) == 2
    assert re.search(r"^  \| .*\?⟦ \w+⟧$", text, re.M)
    assert "\x1b" not in text


def test_choices_are_shown_with_the_right_one_marked(capsys, config):
    text = shown(capsys, "--config", config, "--rows=1", "--split=test")
    item = text[text.index("test: ") :].splitlines()
    choices = [line for line in item if "⟦" in line]
    assert "4 choices" in item[0]
    assert len(choices) == 4
    assert sum(line.startswith("  | right  ⟦") for line in choices) == 1
    assert sum(line.startswith("  |        ⟦") for line in choices) == 3


def test_every_split_is_shown_where_all_are_asked_for(capsys, config):
    text = shown(capsys, "--config", config, "--rows=1", "--split=all")
    assert re.findall(r"^(\w+): .*tokens", text, re.M) == ["train", "validation", "test"]


def test_figures_and_rows_for_machines(capsys, config):
    document = json.loads(shown(capsys, "--config", config, "--json", "--split=validation", "--rows=2"))
    assert [split["items"] for split in document["parts"].values()] == [12, 3, 3]
    assert document["parts"]["train"]["forms"] == {"choices": 12}
    items = document["examples"]["validation"]
    assert [sum(row["right"] for row in item["rows"]) for item in items] == [1, 1]
    assert all(any(piece["learnt"] for piece in row["pieces"]) for item in items for row in item["rows"])


def test_what_is_learnt_is_coloured_where_that_is_asked_for(capsys, tmp_path):
    text = shown(capsys, *instructions(tmp_path, {"instruction": "a", "output": "yes"}), "--color=always")
    assert "\x1b[1;32myes\x1b[0m\x1b[1;32m\x1b[36m</s>\x1b[0m" in text
    assert "⟦" not in text


def test_colours_are_for_terminals(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert not colours("auto")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert colours("auto")
    assert not colours("never")
    monkeypatch.setenv("TERM", "dumb")
    assert not colours("auto")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not colours("auto")
    assert colours("always")


def test_nothing_in_the_data_acts_on_the_terminal(capsys, tmp_path):
    row = {"instruction": "Say \x1b]0;pwned\x07 \u202e", "output": "\x1b[31mred\r\x00", "\x1b[2J": 1}
    text = shown(capsys, *instructions(tmp_path, row), "--color=always")
    assert re.sub(r"\x1b\[[0-9;]*m|\n", "", text).isprintable()
    assert re.findall(r"\x1b\[31m|\x1b\[2J", text) == []
    assert "fields of the rows that are not used: '\\x1b[2J'" in text


def test_what_was_dropped_is_told_once(capsys, caplog, tmp_path):
    row = {"question": "a", "human_answers": ["b", "c"], "source": "x"}
    with caplog.at_level(logging.WARNING):
        text = shown(capsys, *instructions(tmp_path, row, {**row, "human_answers": []}))
    assert "note        1 of 2 test rows hold no answer: left out" in text
    assert text.count("that are not used: 'source'") == 1
    assert not [record for record in caplog.records if record.name.startswith("qratk.data")]
    assert re.search(r"^forms +hc3$", text, re.M)


def test_rows_that_are_cut_are_counted_with_what_is_lost(capsys, tmp_path):
    row = {"instruction": "a", "output": "The sky is blue. " * 9}
    given = instructions(tmp_path, row, {**row, "output": "b"})
    text = shown(capsys, *given, "--data.template=plain", "--data.max_length=20")
    assert re.search(r"^rows cut +1 \(50.0%\)$", text, re.M)
    lost = float(re.search(r"^  cut off +([\d.]+)%$", text, re.M)[1])
    assert 0 < lost < 100
    assert re.search(r"tokens, \d+ scored, cut\)", text)


def test_a_module_of_a_third_party_is_shown_as_well(capsys, tmp_path):
    (tmp_path / "mine.py").write_text(THIRD_PARTY)
    path = rows(tmp_path, *({"line": f"{k} eulb si yks ehT", "more": k} for k in range(5)))
    text = shown(capsys, "--model.model=embedded", "--data=mine.Backwards", f"--data.train={path}", "--split=all")
    assert text.startswith("data        Backwards, rows of at most ")
    assert re.search(r"^items +4 +1$", text, re.M)
    assert "The sky is blue" in text
    assert "not used: 'more'" in text


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--data.form=sharegtp"], 2, "expected one of 'auto', 'alpaca'"),
        (["--split=train"], 1, "there is no train data: give the option `train`, or one of --split=test"),
        (["--split=trial"], 2, "--split"),
        (["--rows=-1"], 2, "--rows"),
        (["--data.test=nowhere.jsonl"], 1, "there is no file nowhere.jsonl"),
        (["--model.model=./nowhere"], 1, "nowhere"),
        (["--data.template=chat"], 1, "the tokenizer has no chat template"),
    ],
)
def test_mistakes_end_in_one_message(capsys, tmp_path, arguments, status, message):
    given = instructions(tmp_path, {"instruction": "a", "output": "b"})
    try:
        found = main(["data", *given, *arguments])
    except SystemExit as stop:
        found = stop.code
    error = capsys.readouterr().err
    assert found == status
    assert message in error
    assert "Traceback" not in error


def test_rows_of_two_forms_are_named_with_what_to_set(capsys, tmp_path):
    row = {"instruction": "a", "output": "b", "messages": [{"role": "user", "content": "a"}]}
    assert main(["data", *instructions(tmp_path, row)]) == 1
    assert "rows.jsonl, line 1: the row has the fields of several forms" in capsys.readouterr().err


def test_a_file_of_other_commands_is_taken(capsys, config):
    assert "EmbeddedData" in shown(
        capsys, "--config", "quickstart", "--data.max_train_items=8", "--data.max_test_items=4"
    )


def test_long_stretches_are_shortened_in_the_middle():
    piece = Piece("a" * 50 + "b" * 50, True, False)
    assert Style(characters=30).row([piece]) == "⟦" + "a" * 20 + " [... 70 characters ...] " + "b" * 10 + "⟧"
    assert Style(characters=0).row([piece]) == f"⟦{piece.text}⟧"
    assert Style(colours=True).row([Piece("a\nb", True, False), Piece("<s>", False, True)]) == (
        "\x1b[1;32ma↵\x1b[0m\n\x1b[1;32mb\x1b[0m\x1b[36m<s>\x1b[0m"
    )
    assert Style().row([Piece("", False, False), Piece("x", True, True), Piece("y", True, False)]) == "⟦xy⟧"


def test_text_that_the_output_cannot_hold_is_escaped(monkeypatch):
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding="ascii"))
    print_text("⟦blue⟧↵")
    sys.stdout.flush()
    assert buffer.getvalue() == b"\\u27e6blue\\u27e7\\u21b5\n"
