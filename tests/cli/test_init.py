"""`qratk init` writes a configuration that the other commands take, for the rows and the model at hand."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml

from qratk.__main__ import main


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])


def written(*arguments: str) -> dict:
    """The document that `qratk init` writes."""
    assert main(["init", *arguments, "-o", "new.yaml"]) == 0
    with open("new.yaml") as file:
        return yaml.safe_load(file)


def rows(tmp_path, row: dict, count: int = 40) -> str:
    """A file of equal rows."""
    path = tmp_path / "my rows.jsonl"
    path.write_text((json.dumps(row) + "\n") * count)
    return str(path)


@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.. is deprecated.*")
def test_plan_takes_what_was_written(model_dir, data_files, capsys):
    document = written("--model", str(model_dir), "--data", data_files["train"], "--test", data_files["test"])
    assert document["data"]["class_path"] == "MultipleChoiceData"
    assert document["data"]["init_args"]["max_length"] == 64  # what the model can see
    assert document["search"]["test"] is True
    capsys.readouterr()
    assert main(["plan", "--config", "new.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_layers"] == 3


@pytest.mark.parametrize(
    ("row", "module"),
    [
        ({"question": "a", "choices": ["b", "c"], "label": 0}, "MultipleChoiceData"),
        ({"messages": [{"role": "user", "content": "a"}]}, "InstructionData"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "InstructionData"),
        ({"instruction": "a", "output": "b", "text": "a b"}, "InstructionData"),
        ({"prompt": "a", "completion": "b"}, "InstructionData"),
        ({"question": "a", "answer": "b"}, "InstructionData"),
        ({"text": "a"}, "TextData"),
    ],
)
def test_rows_choose_the_data_module(tmp_path, row, module):
    document = written("--model", "Qwen/Qwen3-0.6B", "--data", rows(tmp_path, row))
    assert document["data"]["class_path"] == module
    assert "rename" not in document["data"]["init_args"]
    assert document["model"]["model"] == "Qwen/Qwen3-0.6B"
    assert document["search"]["test"] is False  # there is no test data


def test_rows_that_nothing_takes_are_refused_with_what_would_do(tmp_path, capsys):
    assert main(["init", "--model", "a/b", "--data", rows(tmp_path, {"x": 1})]) == 1
    error = capsys.readouterr().err
    assert "my rows.jsonl, line 1: no data module takes rows of x" in error
    assert "alpaca (instruction, output)" in error
    assert not (tmp_path / "my.yaml").exists()


def test_long_rows_get_a_long_limit_and_a_small_batch(tmp_path):
    short = written("--model", "a/b", "--data", rows(tmp_path, {"text": "a" * 30}))["data"]["init_args"]
    (tmp_path / "new.yaml").unlink()
    long = written("--model", "a/b", "--data", rows(tmp_path, {"text": "a" * 5000}))["data"]["init_args"]
    assert (short["max_length"], short["batch_size"]) == (64, 8)
    assert (long["max_length"], long["batch_size"]) == (2048, 2)


@pytest.mark.parametrize(("given", "key", "value"), [("5.5GiB", "limit", "5.5GiB"), ("[2, 8]", "like", [2, 8])])
def test_budget_is_taken_as_it_is_given(tmp_path, given, key, value):
    search = written("--model", "a/b", "--data", rows(tmp_path, {"text": "a"}), "--budget", given)["search"]
    assert search[key] == value
    assert ("limit" in search) != ("like" in search)


def test_a_file_is_never_overwritten(tmp_path, capsys):
    (tmp_path / "my.yaml").write_text("mine")
    assert main(["init", "--model", "a/b", "--data", rows(tmp_path, {"text": "a"})]) == 1
    assert "my.yaml is there already" in capsys.readouterr().err
    assert (tmp_path / "my.yaml").read_text() == "mine"


@pytest.mark.parametrize("model", ["./nowhere", "empty"])
def test_local_model_without_a_configuration_is_refused(tmp_path, capsys, model):
    (tmp_path / "empty").mkdir()
    assert main(["init", "--model", model, "--data", rows(tmp_path, {"text": "a"})]) == 1
    assert model.removeprefix("./") in capsys.readouterr().err


def test_nothing_heavy_is_imported():
    code = "import qratk.cli.init, sys; print({'torch', 'transformers', 'lightning', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
