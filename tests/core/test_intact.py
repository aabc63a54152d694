"""Folders and archives whose damage is found when they are read."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from qratk.core.errors import ConfigurationError
from qratk.core.intact import SUMS, require_intact, require_intact_archive, write_sums


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "out" / "inner").mkdir(parents=True)
    for name in ("a.json", "b name.bin", "inner/c.txt"):
        (tmp_path / "out" / name).write_bytes(name.encode() * 100)
    write_sums(tmp_path / "out")
    return tmp_path / "out"


def flip(path: Path, place: int = 7) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_untouched_folder_passes_wherever_it_lies(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    assert require_intact(tmp_path / "copy") == tmp_path / "copy"


@pytest.mark.parametrize("name", ["a.json", "b name.bin", "inner/c.txt"])
def test_one_flipped_bit_is_told_with_the_file(folder: Path, name: str) -> None:
    flip(folder / name)
    with pytest.raises(ConfigurationError, match=f"{name} is damaged"):
        require_intact(folder)


def test_missing_file_is_told(folder: Path) -> None:
    (folder / "a.json").unlink()
    with pytest.raises(ConfigurationError, match=r"a\.json is missing"):
        require_intact(folder)


@pytest.mark.parametrize("place", [0, 70])
def test_damaged_digests_are_told(folder: Path, place: int) -> None:
    flip(folder / SUMS, place)
    with pytest.raises(ConfigurationError, match=SUMS):
        require_intact(folder)


def test_folder_without_digests_passes(folder: Path) -> None:
    (folder / SUMS).unlink()
    flip(folder / "a.json")
    require_intact(folder)


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum")
def test_sha256sum_takes_the_digests(folder: Path) -> None:
    command = ["sha256sum", "--check", "--strict", SUMS]
    assert subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode == 0
    flip(folder / "b name.bin")
    assert subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode == 1


def test_file_that_is_no_archive_passes(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"garbage")
    require_intact_archive(tmp_path / "x")
