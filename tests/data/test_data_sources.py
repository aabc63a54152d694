from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qratk.core import DataError
from qratk.data.sources import read_rows

ROWS = [{"text": "one\u2028two"}, {"text": "three"}]


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def texts(source: Any, **options: Any) -> list[str]:
    return [row.text("text") for row in read_rows(source, "train", **options)]


def test_json_lines_and_json_lists_are_read_alike(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines(ROWS), encoding="utf-8")
    (tmp_path / "b.json").write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    (tmp_path / "c.json").write_text(lines(ROWS), encoding="utf-8")
    for name in ("a.jsonl", "b.json", "c.json"):
        assert texts(str(tmp_path / name)) == ["one\u2028two", "three"]


def test_globs_and_lists_are_read_in_order(tmp_path: Path) -> None:
    for name, text in (("b", "2"), ("a", "1"), ("c", "3")):
        (tmp_path / f"{name}.jsonl").write_text(lines([{"text": text}]), encoding="utf-8")
    assert texts(str(tmp_path / "*.jsonl")) == ["1", "2", "3"]
    assert texts([str(tmp_path / "c.jsonl"), str(tmp_path / "a.jsonl")]) == ["3", "1"]


def test_a_plain_text_file_is_one_row(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    assert texts(str(tmp_path / "a.txt")) == ["one\n\ntwo\n"]


@pytest.mark.usefixtures("datasets_cache")
def test_datasets_folders_and_tables_are_read(tmp_path: Path) -> None:
    import datasets

    data = datasets.Dataset.from_list(ROWS)
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": data, "other": data.select([1])}).save_to_disk(str(tmp_path / "dict"))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.jsonl").write_text(lines(ROWS), encoding="utf-8")
    for source in ("a.parquet", "saved", "dict", "folder"):
        assert texts(str(tmp_path / source)) == ["one\u2028two", "three"]
    assert texts(f"{tmp_path / 'dict'}#other") == ["three"]
    assert texts(f"{folder}#train[:1]") == ["one\u2028two"]


def test_fields_can_be_renamed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines([{"content": "x"}]), encoding="utf-8")
    assert texts(str(tmp_path / "a.jsonl"), rename={"text": "content"}) == ["x"]
    with pytest.raises(DataError, match=r"line 1: the row needs a text field 'text'.*'content'.*rename"):
        texts(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "the file is empty"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "line 2: not valid JSON"),
        ("a.jsonl", '{"text": "a"}\n\n[1]\n', "line 3: a row must be a JSON object"),
        ("a.json", '[{"text": "a"},\n 3]', "element 1: a row must be a JSON object"),
        ("a.json", '[{"text": "a"},\n', "line 2: not valid JSON"),
        ("a.json", "[]", "there are no rows"),
    ],
)
def test_broken_files_are_named_with_the_place(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        texts(str(tmp_path / name))
    assert name in str(caught.value)


def test_a_file_that_is_not_utf_8_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xe9"}\n')
    with pytest.raises(DataError, match="not UTF-8"):
        texts(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("source", ["nowhere.jsonl", "./nowhere", "/nowhere/*.jsonl"])
def test_missing_files_are_an_error(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="train data: there is no file"):
        texts(source)


@pytest.mark.usefixtures("datasets_cache")
def test_a_folder_without_the_split_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.jsonl").write_text(lines(ROWS), encoding="utf-8")
    with pytest.raises(DataError, match=r"split 'other'"):
        texts(f"{folder}#other")


@pytest.mark.parametrize(("name", "builder"), [("all.jsonl", "json"), ("rows.parquet", "parquet"), ("a.csv", "csv")])
def test_files_of_a_data_set_on_the_hub_are_read_by_their_kind(
    name: str, builder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    asked: list[tuple[object, ...]] = []

    def load(path: str, config: str | None, *, split: str, data_files: str) -> list[dict[str, str]]:
        asked.append((path, config, split, data_files))
        return [{"text": "a"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = f"hf://datasets/owner/rows/{name}"
    (row,) = read_rows(source, "train")
    assert asked == [(builder, None, "train", source)]
    assert row.where == f"{source} [train], row 0"
