"""Shipped configurations and recipes are found by name, in the repository and in a wheel."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from qratk.cli import shipped
from qratk.core.errors import ConfigurationError

REPOSITORY = Path(__file__).parents[2]
FILES = {path.relative_to(REPOSITORY / "configs").as_posix() for path in (REPOSITORY / "configs").rglob("*.yaml")}


def test_every_shipped_file_has_a_name_of_its_own():
    assert len(shipped.configurations()) == len(FILES)


@pytest.mark.parametrize("name", ["quickstart", "autoqra", "qlora", "as_published"])
def test_name_is_the_path_of_the_shipped_file(name):
    path = Path(shipped.configuration(name))
    assert path.is_file()
    assert path.stem == name


@pytest.mark.parametrize("given", ["my.yaml", "folder/mine", "./quickstart", "nowhere.yml"])
def test_what_looks_like_a_path_stays(given):
    assert shipped.configuration(given) == given


def test_file_of_the_working_directory_goes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qlora").write_text("{}")
    assert shipped.configuration("qlora") == "qlora"


def test_unknown_name_lists_the_known_and_the_nearest():
    with pytest.raises(ConfigurationError, match=r"known are .*quickstart.*qlora.*Did you mean 'quickstart'\?"):
        shipped.configuration("quikstart")


def test_folder_is_all_its_recipes():
    found = shipped.recipes(["baselines", "as_published"])
    assert [path.stem for path in found[:-1]] == sorted(Path(f).stem for f in FILES if f.startswith("baselines/"))
    assert found[-1].stem == "as_published"


def test_names_after_config_alone_are_replaced():
    given = ["--config", "qlora", "--config=quickstart", "--search.name", "qlora", "--config", "mine.yaml"]
    qlora, quickstart = map(shipped.configuration, ("qlora", "quickstart"))
    expected = ["--config", qlora, f"--config={quickstart}", "--search.name", "qlora", "--config", "mine.yaml"]
    assert shipped.with_paths(given) == expected


@pytest.mark.parametrize("text", ["{search: {name: " + "a" * 300 + "}}", "a" * 300])
def test_settings_on_one_line_in_place_of_a_file_are_no_file_however_long(text):
    assert shipped.files_of(["--config", text]) == []
    assert shipped.files_of([f"--config={text}"]) == []


def test_files_of_an_installed_package_go_before_those_of_the_repository(tmp_path, monkeypatch):
    (tmp_path / "qratk" / "configs").mkdir(parents=True)
    (tmp_path / "configs").mkdir()
    monkeypatch.setattr(shipped, "_PACKAGE", tmp_path / "qratk")
    assert shipped.root() == tmp_path / "qratk" / "configs"


def test_wheel_is_told_to_hold_the_configurations():
    document = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    assert document["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"] == {"configs": "qratk/configs"}


@pytest.mark.skipif(importlib.util.find_spec("hatchling") is None, reason="hatchling builds the wheel")
def test_wheel_holds_every_configuration(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*build, str(REPOSITORY)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("qratk-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"qratk/configs/{name}" for name in FILES} <= names
    assert "qratk/cli/shipped.py" in names
