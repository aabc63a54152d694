"""The durable record of a search: every evaluation, decision and random state, in one SQLite file.

Whatever was measured is on disk before the next measurement begins. A search is resumed by running it again: what the
journal holds is answered from it (`Journal.evaluation`, `Journal.decision`), so that a killed and resumed search takes
the very same decisions as an uninterrupted one. Each row has a digest in the table `checks`, so that damage is found.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from qratk.core.configuration import Configuration
from qratk.core.errors import QratkError, RunDirectoryError
from qratk.core.evaluation import Candidate, Evaluation
from qratk.core.plain import flatten, record_data, record_of
from qratk.core.result import Record
from qratk.run import files

FORMAT: Final = "1"

Comparable = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""Settings by dotted key in the form in which those of two searches are compared."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS evaluations (
    position INTEGER PRIMARY KEY, configuration TEXT NOT NULL, digest TEXT NOT NULL, steps INTEGER NOT NULL,
    score REAL NOT NULL, status TEXT NOT NULL, reason TEXT NOT NULL, seconds REAL NOT NULL, checkpoint TEXT,
    footprint TEXT NOT NULL, outcomes TEXT NOT NULL,
    phase TEXT NOT NULL, generation INTEGER NOT NULL, origin TEXT NOT NULL, parents TEXT NOT NULL,
    figures TEXT NOT NULL DEFAULT '{}', trained_as TEXT, replicate INTEGER NOT NULL DEFAULT 0,
    UNIQUE (configuration, steps, replicate)
);
CREATE TABLE IF NOT EXISTS decisions (position INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, value TEXT NOT NULL);
"""
_CHECKS = """
CREATE TABLE IF NOT EXISTS checks (part TEXT NOT NULL, key TEXT NOT NULL, digest TEXT NOT NULL, PRIMARY KEY (part, key))
"""
_NESTED: Final = ("footprint", "outcomes", "parents", "figures")
_COLUMNS: Final = {
    "meta": ("key", "value"),
    "evaluations": (
        "position", "configuration", "digest", "steps", "score", "status", "reason", "seconds", "checkpoint",
        "footprint", "outcomes", "phase", "generation", "origin", "parents", "figures", "trained_as",
        "replicate",
    ),
    "decisions": ("key", "value"),
}  # fmt: skip
"""The tables whose rows have digests, and what of them, in order; the first column is a row's key."""


@dataclass(frozen=True)
class Contents:
    """What a journal holds: settings and digests it is bound to, evaluations in order, and decisions as JSON."""

    meta: Mapping[str, str]
    records: tuple[Record, ...]
    decisions: Mapping[str, str]


def read_journal(path: Path) -> Contents:
    """What a journal holds by now, also while a search writes it; raises `RunDirectoryError` when it is damaged."""
    # A journal without a log beside it is written by nobody: `immutable` needs no right to write in the folder.
    waiting = path.with_name(path.name + "-wal").exists()
    mode = "mode=ro" if waiting else "mode=ro&immutable=1"
    with _explained(path), closing(sqlite3.connect(f"{path.resolve().as_uri()}?{mode}", uri=True)) as database:
        database.execute("BEGIN")  # all tables as of one moment: a search beside it may record between two reads
        return _contents(database)


class Journal:
    """Record of one run directory, held by one process at a time.

    Opening raises `RunDirectoryError` when another process holds it, or the file is damaged or no journal.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / files.JOURNAL
        self._lock = _locked(run_dir)
        with ExitStack() as undo:
            undo.callback(os.close, self._lock)
            with _explained(self.path):
                self._database = sqlite3.connect(self.path, isolation_level=None)
                undo.callback(self._database.close)
                found = self._opened()
            undo.pop_all()
        self._records = {_key(r.evaluation): r for r in found.records}
        self._withdrawn: dict[_Key, int] = {}
        self._decisions = dict(found.decisions)
        self._meta = dict(found.meta)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the file."""
        self._database.close()
        os.close(self._lock)

    def __len__(self) -> int:
        return len(self._records)

    @property
    def records(self) -> tuple[Record, ...]:
        """All evaluations in the order of measurement."""
        return tuple(sorted(self._records.values(), key=lambda record: record.index))

    def bind(self, part: str, identity: Mapping[str, Any], *, comparable: Comparable = dict) -> None:
        """Tie a new journal to what is searched; raises `RunDirectoryError` naming the difference on an old one.

        `identity` is nested plain data: the settings (part "config"), or digests of model and data ("content").
        `comparable` brings settings by dotted key, those of old and new, into the form in which they are compared.
        """
        given = {"format": FORMAT, **flatten(identity)}
        prefix = f"{part}."
        stored = {key[len(prefix) :]: json.loads(text) for key, text in self._meta.items() if key.startswith(prefix)}
        if not stored:
            flat = {prefix + key: text for key, text in _texts(given).items()}
            with self._transaction():
                self._insert("meta", sorted(flat.items()))
            self._meta |= flat
            return
        there, here = (_texts(comparable(settings)) for settings in (stored, given))
        differences = [key for key in sorted({*there, *here}) if there.get(key) != here.get(key)]
        if differences:
            lines = [
                f"  {prefix}{key}: {there.get(key, 'not set')} there, {here.get(key, 'not set')} now"
                for key in differences
            ]
            raise RunDirectoryError(
                f"{self.path.parent} holds a search with other settings:\n"
                + "\n".join(lines)
                + "\nGive those settings again to resume it, or another --run_dir to start anew."
            )

    def evaluation(self, configuration: Configuration, steps: int, replicate: int = 0) -> Record | None:
        """What was measured of a configuration at a number of steps, in a replicate, if anything."""
        return self._records.get((configuration, steps, replicate))

    def append(self, candidate: Candidate, evaluation: Evaluation) -> Record:
        """The record of an evaluation, on disk when this returns."""
        return self.extend([(candidate, evaluation)])[0]

    def extend(self, measured: Sequence[tuple[Candidate, Evaluation]]) -> list[Record]:
        """The records of evaluations that belong together: when this returns all are on disk, before it none is."""
        keys = [_key(evaluation) for _, evaluation in measured]
        unused = count(len(self._records) + len(self._withdrawn))
        again = [self._withdrawn[key] for key in keys if key in self._withdrawn]
        records = [
            Record(self._withdrawn[key] if key in self._withdrawn else next(unused), candidate, evaluation)
            for key, (candidate, evaluation) in zip(keys, measured, strict=True)
        ]
        with self._transaction():
            for position in again:
                self._database.execute("DELETE FROM evaluations WHERE position = ?", (position,))
                self._database.execute("DELETE FROM checks WHERE part = 'evaluations' AND key = ?", (str(position),))
            self._insert("evaluations", [_row(record) for record in records])
        for key, record in zip(keys, records, strict=True):
            self._records[key] = record
            self._withdrawn.pop(key, None)
        return records

    def withdraw(self, which: Callable[[Evaluation], bool]) -> tuple[Record, ...]:
        """Take back the evaluations that `which` names: they count as not measured.

        On disk each stays until it is recorded again, in its old place.
        """
        taken = tuple(record for record in self.records if which(record.evaluation))
        for record in taken:
            key = _key(record.evaluation)
            self._withdrawn[key] = self._records.pop(key).index
        return taken

    def decision(self, key: str) -> Any:
        """Plain data recorded under a key; None when that decision was not taken yet."""
        text = self._decisions.get(key)
        return None if text is None else json.loads(text)

    def decide(self, key: str, value: Any) -> None:
        """Record a decision as plain data; each key is decided once."""
        text = json.dumps(value, allow_nan=True)
        with self._transaction():
            self._insert("decisions", [(key, text)])
        self._decisions[key] = text

    def decided(self, key: str, decide: Callable[[], Any]) -> Any:
        """A decision as plain data: the recorded one, or else what `decide` returns, recorded."""
        saved = self.decision(key)
        if saved is None:
            saved = decide()
            self.decide(key, saved)
        return saved

    def _opened(self) -> Contents:
        """What the file holds; a new one gets its tables, one from before digests or a column what it lacks."""
        found = _contents(self._database)
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = FULL")
        former = _present(self._database, "evaluations")
        if "checks" not in _tables(self._database) or former != _COLUMNS["evaluations"]:
            with self._transaction():
                if former:  # copied, since what makes a row one of its kind may be another thing by now
                    self._database.execute("ALTER TABLE evaluations RENAME TO former")
                for statement in (*_SCHEMA.split(";"), _CHECKS, "DELETE FROM checks"):
                    self._database.execute(statement)
                if former:
                    columns = ", ".join(former)
                    self._database.execute(f"INSERT INTO evaluations ({columns}) SELECT {columns} FROM former")
                    self._database.execute("DROP TABLE former")
                for table in _COLUMNS:
                    self._check(table, _rows(self._database, table))
        return found

    def _insert(self, table: str, rows: Sequence[tuple[Any, ...]]) -> None:
        columns = _COLUMNS[table]
        places = ", ".join("?" * len(columns))
        self._database.executemany(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({places})", rows)
        # Read back: what SQLite returns is what a later opening compares (it makes 0.0 of -0.0).
        for row in rows:
            self._check(table, _rows(self._database, table, key=row[0]))

    def _check(self, table: str, rows: Sequence[tuple[Any, ...]]) -> None:
        digests = [(table, str(row[0]), _digest(row)) for row in rows]
        self._database.executemany("INSERT INTO checks VALUES (?, ?, ?)", digests)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """BEGIN ... COMMIT; a disk that is full ends in an error that says what to do."""
        try:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise
        except sqlite3.OperationalError as error:
            raise RunDirectoryError(
                f"cannot write {self.path}: {error}. Free some space, then run the same command to go on; "
                "what was measured before is kept."
            ) from error


_Key = tuple[Configuration, int, int]


def _key(evaluation: Evaluation) -> _Key:
    """What there is one evaluation of: a configuration at a number of steps, in a replicate."""
    return evaluation.configuration, evaluation.steps, evaluation.replicate


def _texts(settings: Mapping[str, Any]) -> dict[str, str]:
    return {key: json.dumps(value, sort_keys=True) for key, value in settings.items()}


def _locked(run_dir: Path) -> int:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run_dir / files.LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RunDirectoryError(
            f"{run_dir} cannot be written ({error.strerror or error}); give another --run_dir, or the right to write"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise RunDirectoryError(
            f"{run_dir} is in use by another process; wait for it to end, or give another --run_dir"
        ) from error
    return descriptor


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Context in which what is wrong with a file ends in an error that names it and says what to do."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        code = error.sqlite_errorcode & 0xFF if hasattr(error, "sqlite_errorcode") else 0
        if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
            raise RunDirectoryError(
                f"{path} cannot be opened ({error}); free some space, or restore access to its folder, and try again"
            ) from error
        raise _unusable(path, error) from error
    except RunDirectoryError:
        raise
    except (QratkError, ValueError) as error:
        raise _unusable(path, error) from error


def _unusable(path: Path, why: object) -> RunDirectoryError:
    return RunDirectoryError(
        f"{path} is no usable journal ({why}): it is damaged, or not a journal. Restore a copy of it, or move it away "
        "and begin anew, or give another --run_dir"
    )


def _contents(database: sqlite3.Connection) -> Contents:
    """All that a database holds, checked; raises `sqlite3.DatabaseError` or `ValueError`."""
    (state,) = database.execute("PRAGMA integrity_check(1)").fetchone()
    if state != "ok":
        raise ValueError(str(state).splitlines()[-1])
    tables = _tables(database)
    checked = "checks" in tables
    rows = {table: _rows(database, table) if checked or table in tables else [] for table in _COLUMNS}
    if checked:
        stored = {(table, key): digest for table, key, digest in database.execute("SELECT * FROM checks")}
        if stored != {(table, str(row[0])): _digest(row) for table, found in rows.items() for row in found}:
            raise ValueError("rows differ from their digests")
    columns = _present(database, "evaluations")
    records = tuple(_record(columns, row) for row in rows["evaluations"])
    if [record.index for record in records] != list(range(len(records))):
        raise ValueError("evaluations are missing")
    for _, value in rows["decisions"]:
        json.loads(value)
    return Contents(dict(rows["meta"]), records, dict(rows["decisions"]))


def _tables(database: sqlite3.Connection) -> set[str]:
    return {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def _columns(database: sqlite3.Connection, table: str) -> set[str]:
    return {name for _, name, *_ in database.execute(f"PRAGMA table_info({table})")}


def _present(database: sqlite3.Connection, table: str) -> tuple[str, ...]:
    """Those of a table's columns that it has in this file."""
    there = _columns(database, table)
    return tuple(column for column in _COLUMNS[table] if column in there)


def _rows(database: sqlite3.Connection, table: str, *, key: object = None) -> list[tuple[Any, ...]]:
    """Rows of a table in order, or the one of a key."""
    columns = _present(database, table)
    where, given = ("", ()) if key is None else (f" WHERE {columns[0]} = ?", (key,))
    return database.execute(f"SELECT {', '.join(columns)} FROM {table}{where} ORDER BY rowid", given).fetchall()


def _digest(row: Sequence[Any]) -> str:
    """Digest of what SQLite gives back of a row."""
    return hashlib.sha256(json.dumps(row, default=str).encode()).hexdigest()[:16]


def _row(record: Record) -> tuple[Any, ...]:
    data = record_data(record)
    values = ((key, data[key]) for key in _COLUMNS["evaluations"])
    return tuple(json.dumps(value) if key in _NESTED else value for key, value in values)


def _record(columns: Sequence[str], row: Sequence[Any]) -> Record:
    values = zip(columns, row, strict=True)
    return record_of({key: json.loads(value) if key in _NESTED else value for key, value in values})
