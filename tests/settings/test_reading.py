"""Settings are read as they are written, and what is no settings is told with file and line."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml

from qratk.core.errors import ConfigurationError
from qratk.settings.reading import load, read_settings


@pytest.mark.parametrize("text", ["4:4", "4:8", "190:20:30", "16:16", "2:4.5", "2026-11-25", "4:8*3 2:16", "-1:10"])
def test_pairs_and_dates_stay_text(text: str) -> None:
    assert load(f"configuration: {text}") == {"configuration": text}


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("-12", -12), ("1_000", 1000), ("0x1f", 31), ("017", 15), ("0b11", 3), ("1e-4", 1e-4), ("2.", 2.0),
     (".5", 0.5), ("+1.5E3", 1500.0), (".inf", math.inf), ("true", True), ("null", None), ("~", None), ("08", "08")],
)  # fmt: skip
def test_numbers_and_words_keep_their_meaning(text: str, value: object) -> None:
    found = load(f"x: [{text}]")["x"][0]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", ["a:", "{a, b}"])
def test_words_that_look_like_keys_without_values_stay_text(text: str) -> None:
    assert load(text) == text


@pytest.mark.parametrize(
    ("content", "line", "text"),
    [
        (b"search: {seed: 1}\nmodel: {}\nsearch: {seed: 2}\n", 3, r"'search' is given twice, first in line 1"),
        (b"search:\n  searcher:\n    init_args: {offspring: 3, offspring: 4}\n", 3, r"'offspring' is given twice"),
        (b"search:\n  name: \xff\n", 2, "is not UTF-8"),
        (b"model: {}\ndata:\n  class_path: null\n", 3, "'class_path' must be a name"),
        (b"search:\n  mutations:\n  - class_path:\n", 3, "'class_path' must be a name"),
        (b"search: {}\ntrainer: [1]\n", 2, "'trainer' must hold settings by name"),
        (b"model: 4\n", 1, "'model' must hold settings by name"),
        (b"search:\n  bits: [2, 4\n", 3, "is no YAML"),
    ],
)
def test_mistake_of_a_file_is_told_with_its_line(tmp_path: Path, content: bytes, line: int, text: str) -> None:
    path = tmp_path / "my.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=rf"my\.yaml:{line}\b.*{text}"):
        read_settings(path)


@pytest.mark.parametrize("content", [b"", b"# nothing\n", b"- 1\n", b"text\n"])
def test_file_without_settings_is_told(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "my.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"my\.yaml .*settings by name"):
        read_settings(path)


def test_shipped_configurations_read_as_before() -> None:
    for path in (Path(__file__).parents[2] / "configs").rglob("*.yaml"):
        assert read_settings(path) == yaml.safe_load(path.read_text(encoding="utf-8"))


def test_anchors_and_merged_mappings_are_read(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("a: &a {x: 1}\nb: {<<: *a, x: 2}\n")
    assert read_settings(path) == {"a": {"x": 1}, "b": {"x": 2}}


@pytest.mark.parametrize("text", ["4:4", "2:8*6 4:4"])
def test_configuration_without_quotes_reaches_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    from qratk.__main__ import main

    path = tmp_path / "my.yaml"
    path.write_text(f"model: {{model: embedded, configuration: {text}}}\ndata: EmbeddedData\n")
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(path), "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["model"]["configuration"] == text


def test_repeated_section_ends_a_command_with_file_and_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from qratk.__main__ import main

    path = tmp_path / "my.yaml"
    path.write_text("model: {model: embedded}\ndata: EmbeddedData\nsearch: {like: [4, 8]}\nsearch: {seed: 1}\n")
    assert main(["search", "--config", str(path)]) == 1
    assert f"{path}:4: 'search' is given twice, first in line 3" in capsys.readouterr().err
