"""The journal keeps what was measured, to the bit, and refuses what does not belong to it."""

from __future__ import annotations

import math
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from qratk.core import Candidate, Configuration, Evaluation, Footprint, RunDirectoryError
from qratk.journal import Journal, flatten

FOOTPRINT = Footprint(weights=10, metadata=2, adapters=3, fixed=5, training_bytes=40, serving_bytes=30)


def evaluation(text: str = "4:8 2:16", steps: int = 10, score: float = 0.1 + 0.2) -> Evaluation:
    return Evaluation(Configuration.from_text(text), steps, score, FOOTPRINT, (0.1, 1 / 3), 1.5, checkpoint="c/10")


def candidate(text: str = "4:8 2:16") -> Candidate:
    return Candidate(Configuration.from_text(text), "sensitivity", ("abc",), 3, "global")


def fill(journal: Journal) -> None:
    for steps in range(11, 400):
        journal.append(candidate(), evaluation(steps=steps))


def test_an_evaluation_comes_back_equal_from_another_connection(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        written = journal.append(candidate(), evaluation())
    with Journal(tmp_path) as journal:
        assert journal.records == (written,)
        assert journal.evaluation(candidate().configuration, 10) == written
        assert journal.evaluation(candidate().configuration, 20) is None


def test_a_failed_evaluation_keeps_its_reason(tmp_path: Path) -> None:
    failed = Evaluation(candidate().configuration, 10, -math.inf, FOOTPRINT, status="failed", reason="loss is nan")
    with Journal(tmp_path) as journal:
        journal.append(candidate(), failed)
    with Journal(tmp_path) as journal:
        assert journal.records[0].evaluation == failed


def test_an_evaluation_is_on_disk_before_append_returns(tmp_path: Path) -> None:
    """A process that kills itself right after `append` leaves the evaluation behind."""
    code = (
        "import os, signal, sys; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "from test_journal import *\n"
        "journal = Journal(Path(sys.argv[1])); journal.append(candidate(), evaluation())\n"
        "journal.decide('k', [1]); os.kill(os.getpid(), signal.SIGKILL)"
    )
    here = str(Path(__file__).parent)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), here], check=False)
    assert done.returncode == -9
    with Journal(tmp_path) as journal:
        assert journal.records[0].evaluation == evaluation()
        assert journal.decision("k") == [1]


def test_the_same_configuration_is_not_recorded_twice_at_the_same_steps(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.append(candidate(), evaluation())
        with pytest.raises(sqlite3.IntegrityError):
            journal.append(candidate(), evaluation())
        journal.append(candidate(), evaluation(steps=20))
        assert len(journal) == 2


def test_another_configuration_is_refused_and_the_difference_named(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.bind("config", {"search": {"seed": 0, "bits": [2, 4]}})
        journal.bind("content", {"model": "abc"})
    with Journal(tmp_path) as journal:
        journal.bind("config", {"search": {"seed": 0, "bits": [2, 4]}})
        with pytest.raises(RunDirectoryError, match=r"config\.search\.seed: 0 there, 1 now"):
            journal.bind("config", {"search": {"seed": 1, "bits": [2, 4]}})
        with pytest.raises(RunDirectoryError, match=r"content\.model"):
            journal.bind("content", {"model": "abd"})


def test_two_processes_cannot_hold_one_run_directory(tmp_path: Path) -> None:
    with Journal(tmp_path), pytest.raises(RunDirectoryError, match="in use by another process"):
        Journal(tmp_path)
    Journal(tmp_path).close()


def test_a_file_that_is_no_journal_is_refused(tmp_path: Path) -> None:
    (tmp_path / "journal.sqlite").write_bytes(b"not a database at all, but long enough to look at" * 10)
    with pytest.raises(RunDirectoryError, match="no usable journal"):
        Journal(tmp_path)


def test_a_decision_is_taken_once(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        assert journal.decision("a") is None
        journal.decide("a", {"rng": 2**127, "x": 0.1})
        assert journal.decision("a") == {"rng": 2**127, "x": 0.1}
        with pytest.raises(sqlite3.IntegrityError):
            journal.decide("a", 1)


def test_a_full_disk_ends_in_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.append(candidate(), evaluation())
        pages = journal._database.execute("PRAGMA page_count").fetchone()[0]
        journal._database.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(RunDirectoryError, match="Free some space, then run the same command"):
            fill(journal)
        kept = len(journal)
    with Journal(tmp_path) as journal:
        assert len(journal) == kept


def test_flatten_joins_keys_with_dots() -> None:
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "a.c": {}, "d": [1]}
