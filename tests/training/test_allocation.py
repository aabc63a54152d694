"""Freed memory is kept where glibc allocates it, unless the environment says how it shall behave."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from qratk.training import allocation

FAULTS = """
import resource, sys, torch
from qratk.training.allocation import keep_freed_memory
torch.set_num_threads(1)
kept = keep_freed_memory() if sys.argv[1] == "kept" else False
def work():
    for _ in range(20):
        tensors = [torch.ones(1 << 24) for _ in range(2)]  # 64 MiB each
        del tensors
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(kept: str, **environment: str) -> tuple[bool, int]:
    """Whether memory is kept, and how many pages a process had to get anew."""
    command = [sys.executable, "-c", FAULTS, kept]
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(command, env={**own, **environment}, capture_output=True, text=True, check=True, timeout=120)
    answer, count = done.stdout.split()
    return answer == "True", int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_what_was_freed_needs_no_new_pages() -> None:
    kept, few = faults("kept")
    assert kept
    assert few < faults("returned")[1] / 10


def test_the_environment_has_the_first_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "100000")
    assert allocation.keep_freed_memory.__wrapped__() is False


def test_another_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert allocation.keep_freed_memory.__wrapped__() is False
