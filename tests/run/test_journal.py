"""The journal keeps what was measured, to the bit, and refuses what does not belong to it."""

from __future__ import annotations

import hashlib
import json
import math
import resource
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qratk.core import Candidate, Configuration, Evaluation, Footprint, RunDirectoryError
from qratk.run import files
from qratk.run import journal as journal_module
from qratk.run.journal import Journal, read_journal
from qratk.settings.identity import comparable

FORMER_COLUMNS = (
    "position, configuration, digest, steps, score, status, reason, seconds, checkpoint, footprint, outcomes, phase, "
    "generation, origin, parents"
)
FOOTPRINT = Footprint(weights=10, metadata=2, adapters=3, fixed=5, training_bytes=40, serving_bytes=30)


def evaluation(text: str = "4:8 2:16", steps: int = 10, score: float = 0.1 + 0.2) -> Evaluation:
    figures = {"acc": 1 / 3, "log_likelihood": -0.1, "perplexity": 1e9}
    configuration = Configuration.from_text(text)
    return Evaluation(configuration, steps, score, FOOTPRINT, (0.1, 1 / 3), 1.5, checkpoint="c/10", figures=figures)


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


def test_a_disk_that_is_full_at_the_start_is_told_as_such(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        with pytest.raises(RunDirectoryError, match=r"(?i)journal\.sqlite.*free some space"):
            Journal(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with Journal(tmp_path) as journal:
        assert len(journal) == 0


def test_settings_that_decide_no_measurement_may_be_others_when_a_search_goes_on(tmp_path: Path) -> None:
    settings = {"search": {"test": True, "name": "a", "seed": 0}, "trainer": {"logger": True}, "model": {"model": "x"}}
    shown = {"search": {"test": False, "name": "b", "seed": 0}, "trainer": {"logger": False}, "model": {"model": "x"}}
    for given in (settings, shown):
        with Journal(tmp_path) as journal:
            journal.bind("config", given, comparable=comparable)
    settings["search"]["seed"] = 1
    with Journal(tmp_path) as journal, pytest.raises(RunDirectoryError, match=r"search\.seed: 0 there, 1 now"):
        journal.bind("config", settings, comparable=comparable)


def test_what_a_running_search_has_recorded_can_be_read_beside_it(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.bind("content", {"model": "abc"})
        written = journal.append(candidate(), evaluation())
        journal.decide("a", [1])
        found = read_journal(journal.path)
    assert found == read_journal(journal.path)
    assert found.records == (written,)
    assert found.decisions == {"a": "[1]"}
    assert found.meta["content.model"] == '"abc"'


def test_a_journal_that_grows_while_it_is_read_is_read_as_it_was_at_one_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Journal(tmp_path) as journal:
        written = journal.append(candidate(), evaluation())
        rows = journal_module._rows

        def rows_and_then_one_more(
            database: sqlite3.Connection, table: str, *, key: object = None
        ) -> list[tuple[object, ...]]:
            found = rows(database, table, key=key)
            if key is None and table == "evaluations":
                monkeypatch.setattr(journal_module, "_rows", rows)
                journal.append(candidate(), evaluation(steps=20))
            return found

        monkeypatch.setattr(journal_module, "_rows", rows_and_then_one_more)
        assert read_journal(journal.path).records == (written,)
        assert len(journal) == 2


def test_a_score_of_minus_zero_is_no_damage(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.append(candidate(), evaluation(score=-0.0))
    assert read_journal(journal.path).records[0].evaluation.score == 0.0


def finished(folder: Path) -> Path:
    with Journal(folder) as journal:
        journal.bind("config", {"search": {"seed": 0, "bits": [2, 4]}})
        for steps in range(11, 31):
            journal.append(candidate(), evaluation(steps=steps, score=steps / 7))
            journal.decide(f"generation/{steps}", {"rng": 2**127 + steps, "requests": ["4:8"] * 20})
    return folder / files.JOURNAL


@pytest.mark.parametrize("size", [1, 16, 400])
def test_a_damaged_journal_is_unharmed_or_refused_in_one_message(tmp_path: Path, size: int) -> None:
    path = finished(tmp_path)
    whole, before = path.read_bytes(), read_journal(path)
    rng = np.random.default_rng(size)
    messages = []
    for _ in range(40):
        at = int(rng.integers(len(whole)))
        path.write_bytes(whole[:at] + rng.bytes(size) + whole[at + size :])
        for opened in (read_journal, lambda path: Journal(path.parent).close()):
            try:
                assert opened(path) in (before, None)
            except RunDirectoryError as error:
                messages.append(str(error))
    assert len(messages) > 10
    assert all(str(path) in message for message in messages)


def test_a_journal_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    path = finished(tmp_path)
    whole = path.read_bytes()
    for length in range(100, len(whole), 1500):
        path.write_bytes(whole[:length])
        with pytest.raises(RunDirectoryError, match="no usable journal"):
            read_journal(path)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE evaluations SET score = 0.5 WHERE position = 3",
        "UPDATE evaluations SET figures = '{}' WHERE position = 3",
        "ALTER TABLE evaluations DROP COLUMN figures",
        "UPDATE decisions SET value = '[]' WHERE key = 'generation/12'",
        "DELETE FROM evaluations WHERE position = 19",
        "DELETE FROM checks WHERE part = 'decisions'",
        "DROP TABLE decisions",
    ],
)
def test_a_journal_that_somebody_edited_is_refused(tmp_path: Path, statement: str) -> None:
    path = finished(tmp_path)
    with sqlite3.connect(path) as database:
        database.execute(statement)
    database.close()
    for opened in (read_journal, lambda path: Journal(path.parent)):
        with pytest.raises(RunDirectoryError, match="no usable journal"):
            opened(path)


def test_a_journal_from_before_digests_opens_and_has_them_from_then_on(tmp_path: Path) -> None:
    path = finished(tmp_path)
    before = read_journal(path)
    with sqlite3.connect(path) as database:
        database.execute("DROP TABLE checks")
    database.close()
    assert read_journal(path) == before
    Journal(tmp_path).close()
    assert read_journal(path) == before
    with sqlite3.connect(path) as database:
        assert database.execute("SELECT count(*) FROM checks").fetchone() == (20 + 20 + 3,)
        database.execute("UPDATE evaluations SET seconds = 7 WHERE position = 3")
    database.close()
    with pytest.raises(RunDirectoryError, match="no usable journal"):
        read_journal(path)


def make_former(database: sqlite3.Connection, *lacking: str) -> None:
    """Make the evaluations a table of before replicates were, with one row for each configuration and steps."""
    found = [(name, kind) for _, name, kind, *_ in database.execute("PRAGMA table_info(evaluations)")]
    kept = [name for name, _ in found if name not in ("replicate", *lacking)]
    types = {name: kind + (" PRIMARY KEY" if name == "position" else "") for name, kind in found}
    columns = ", ".join(f"{name} {types[name]}" for name in kept)
    database.execute(f"CREATE TABLE former ({columns}, UNIQUE (configuration, steps))")
    database.execute(f"INSERT INTO former SELECT {', '.join(kept)} FROM evaluations")
    database.execute("DROP TABLE evaluations")
    database.execute("ALTER TABLE former RENAME TO evaluations")


def before_figures(folder: Path) -> Path:
    """A finished journal as it was written before figures were: without their column, nor that in the digests."""
    path = finished(folder)
    with sqlite3.connect(path) as database:
        make_former(database, "figures", "trained_as")
        for row in database.execute(f"SELECT {FORMER_COLUMNS} FROM evaluations").fetchall():
            digest = hashlib.sha256(json.dumps(row).encode()).hexdigest()[:16]
            database.execute("UPDATE checks SET digest = ? WHERE part = 'evaluations' AND key = ?", (digest, row[0]))
    database.close()
    return path


def test_a_journal_from_before_figures_is_read_without_them_and_takes_them_from_then_on(tmp_path: Path) -> None:
    path = before_figures(tmp_path)
    before = read_journal(path)
    assert len(before.records) == 20
    assert all(record.evaluation.figures == {} for record in before.records)
    with Journal(tmp_path) as journal:
        assert journal.records == before.records
        added = journal.append(candidate(), evaluation(steps=500))
    after = read_journal(path)
    assert after.records == (*before.records, added)
    assert after.records[-1].evaluation.figures == evaluation().figures
    assert after.decisions == before.decisions


def test_a_journal_from_before_figures_that_somebody_edited_is_refused(tmp_path: Path) -> None:
    path = before_figures(tmp_path)
    with sqlite3.connect(path) as database:
        database.execute("UPDATE evaluations SET score = 0.5 WHERE position = 3")
    database.close()
    for opened in (read_journal, lambda path: Journal(path.parent)):
        with pytest.raises(RunDirectoryError, match="no usable journal"):
            opened(path)


def test_a_journal_from_before_trainings_were_shared_goes_on(tmp_path: Path) -> None:
    path = finished(tmp_path)
    before = read_journal(path)
    with sqlite3.connect(path) as database:
        make_former(database, "trained_as")
        database.execute("DROP TABLE checks")
    database.close()
    assert read_journal(path) == before
    evaluation = replace(before.records[0].evaluation, steps=12345, trained_as="0123456789abcdef")
    with Journal(tmp_path) as journal:
        record = journal.append(before.records[0].candidate, evaluation)
    assert read_journal(path).records == (*before.records, record)


def test_which_training_an_evaluation_is_of_is_kept(tmp_path: Path) -> None:
    first = read_journal(finished(tmp_path)).records[0]
    shared = replace(first.evaluation, steps=12345, trained_as="0123456789abcdef")
    with Journal(tmp_path) as journal:
        journal.append(first.candidate, shared)
    assert read_journal(tmp_path / files.JOURNAL).records[-1].evaluation == shared
    assert shared.training == "0123456789abcdef"
    assert first.evaluation.training == first.evaluation.configuration.digest


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(RunDirectoryError, match="cannot be written"):
        Journal(tmp_path / "run")


def test_a_withdrawn_evaluation_counts_as_not_measured_and_keeps_its_place(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        fill(journal)
        old = journal.append(candidate(), evaluation(steps=10))
    with Journal(tmp_path) as journal:
        assert journal.withdraw(lambda e: e.steps == 10) == (old,)
        assert journal.evaluation(candidate().configuration, 10) is None
    with Journal(tmp_path) as journal:  # nothing was recorded in its stead
        assert old in journal.records
        journal.withdraw(lambda e: e.steps == 10)
        other = journal.append(candidate(), evaluation(steps=500))
        again = journal.append(candidate(), evaluation(steps=10, score=3.0))
        assert (again.index, other.index) == (old.index, old.index + 1)
    with Journal(tmp_path) as journal:
        assert journal.records[-2:] == (again, other)


def test_replicates_are_kept_beside_the_first_run_in_a_journal_from_before_there_were_any_too(tmp_path: Path) -> None:
    path = finished(tmp_path)
    with sqlite3.connect(path) as database:
        make_former(database)
        database.execute("DROP TABLE checks")
    database.close()
    first = read_journal(path).records[0]
    again = [replace(first.evaluation, score=0.25 * number, replicate=number) for number in (1, 2)]
    with Journal(tmp_path) as journal:
        journal.extend([(first.candidate, evaluation) for evaluation in again])
        with pytest.raises(sqlite3.IntegrityError):
            journal.append(first.candidate, again[0])
    with Journal(tmp_path) as journal:
        own = first.evaluation
        found = [journal.evaluation(own.configuration, own.steps, number) for number in range(4)]
        assert [record and record.evaluation for record in found] == [own, *again, None]
    assert [record.evaluation for record in read_journal(path).records[-2:]] == again
