"""The durable record of a search: every evaluation, decision and random state, in one SQLite file.

Whatever was measured is on disk before the next measurement begins. A search is resumed by running it again: what the
journal holds is answered from it (`Journal.evaluation`, `Journal.decision`), so that a killed and resumed search takes
the very same decisions as an uninterrupted one.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from qratk.core.configuration import Configuration
from qratk.core.errors import RunDirectoryError
from qratk.core.evaluation import Candidate, Evaluation
from qratk.core.memory import Footprint
from qratk.core.result import Record

FORMAT = "1"

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS evaluations (
    position INTEGER PRIMARY KEY, configuration TEXT NOT NULL, digest TEXT NOT NULL, steps INTEGER NOT NULL,
    score REAL NOT NULL, status TEXT NOT NULL, reason TEXT NOT NULL, seconds REAL NOT NULL, checkpoint TEXT,
    footprint TEXT NOT NULL, outcomes TEXT NOT NULL,
    phase TEXT NOT NULL, generation INTEGER NOT NULL, origin TEXT NOT NULL, parents TEXT NOT NULL,
    UNIQUE (configuration, steps)
);
CREATE TABLE IF NOT EXISTS decisions (position INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, value TEXT NOT NULL);
"""


class Journal:
    """Record of one run directory, held by one process at a time.

    Opening raises `RunDirectoryError` when another process holds it, or the file is no journal of this format.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "journal.sqlite"
        run_dir.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(run_dir / "journal.lock")
        try:
            self._database = sqlite3.connect(self.path, isolation_level=None)
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = FULL")
            self._database.executescript(_SCHEMA)
        except sqlite3.DatabaseError as error:
            os.close(self._lock)
            raise RunDirectoryError(
                f"{self.path} is no usable journal ({error}); move it away, or give another --run_dir"
            ) from error
        self._records = {(r.evaluation.configuration, r.evaluation.steps): r for r in self._read()}

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

    def bind(self, part: str, identity: Mapping[str, Any]) -> None:
        """Tie a new journal to what is searched; raises `RunDirectoryError` naming the difference on an old one.

        `identity` is nested plain data: the settings (part "config"), or digests of model and data ("content").
        """
        flat = {f"{part}.{key}": json.dumps(value, sort_keys=True) for key, value in flatten(identity).items()}
        flat[f"{part}.format"] = json.dumps(FORMAT)
        rows = self._database.execute("SELECT key, value FROM meta").fetchall()
        stored = {key: value for key, value in rows if key.startswith(f"{part}.")}
        if not stored:
            with self._transaction():
                self._database.executemany("INSERT INTO meta VALUES (?, ?)", sorted(flat.items()))
            return
        differences = [key for key in sorted({*flat, *stored}) if flat.get(key) != stored.get(key)]
        if differences:
            lines = [
                f"  {key}: {stored.get(key, 'not set')} there, {flat.get(key, 'not set')} now" for key in differences
            ]
            raise RunDirectoryError(
                f"{self.path.parent} holds a search with other settings:\n"
                + "\n".join(lines)
                + "\nGive those settings again to resume it, or another --run_dir to start anew."
            )

    def evaluation(self, configuration: Configuration, steps: int) -> Record | None:
        """What was measured of a configuration at a number of steps, if anything."""
        return self._records.get((configuration, steps))

    def append(self, candidate: Candidate, evaluation: Evaluation) -> Record:
        """The record of an evaluation, on disk when this returns."""
        return self.extend([(candidate, evaluation)])[0]

    def extend(self, measured: Sequence[tuple[Candidate, Evaluation]]) -> list[Record]:
        """The records of evaluations that belong together: when this returns all are on disk, before it none is."""
        first = len(self._records)
        records = [
            Record(first + number, candidate, evaluation) for number, (candidate, evaluation) in enumerate(measured)
        ]
        with self._transaction():
            self._database.executemany(
                f"INSERT INTO evaluations VALUES ({', '.join('?' * 15)})", [_row(record) for record in records]
            )
        self._records.update({(r.evaluation.configuration, r.evaluation.steps): r for r in records})
        return records

    def decision(self, key: str) -> Any:
        """Plain data recorded under a key; None when that decision was not taken yet."""
        row = self._database.execute("SELECT value FROM decisions WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def decide(self, key: str, value: Any) -> None:
        """Record a decision as plain data; each key is decided once."""
        with self._transaction():
            self._database.execute(
                "INSERT INTO decisions (key, value) VALUES (?, ?)", (key, json.dumps(value, allow_nan=True))
            )

    def decided(self, key: str, decide: Callable[[], Any]) -> Any:
        """A decision as plain data: the recorded one, or else what `decide` returns, recorded."""
        saved = self.decision(key)
        if saved is None:
            saved = decide()
            self.decide(key, saved)
        return saved

    def _transaction(self) -> _Transaction:
        return _Transaction(self._database, self.path)

    def _read(self) -> list[Record]:
        columns = "position, configuration, steps, score, status, reason, seconds, checkpoint, footprint, outcomes"
        rows = self._database.execute(
            f"SELECT {columns}, phase, generation, origin, parents FROM evaluations ORDER BY position"
        )
        return [_record(row) for row in rows]


class _Transaction:
    """BEGIN ... COMMIT; a disk that is full ends in an error that says what to do."""

    def __init__(self, database: sqlite3.Connection, path: Path) -> None:
        self._database, self._path = database, path

    def __enter__(self) -> None:
        self._database.execute("BEGIN IMMEDIATE")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._database.execute("COMMIT")
                return
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
        except sqlite3.OperationalError as failure:
            error = failure
        if isinstance(error, sqlite3.OperationalError):
            raise RunDirectoryError(
                f"cannot write {self._path}: {error}. Free some space, then run the same command to go on; "
                "what was measured before is kept."
            ) from error


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat


def _locked(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise RunDirectoryError(
            f"{path.parent} is in use by another process; wait for it to end, or give another --run_dir"
        ) from error
    return descriptor


def _row(record: Record) -> tuple[Any, ...]:
    evaluation, candidate = record.evaluation, record.candidate
    return (
        record.index,
        str(evaluation.configuration),
        evaluation.configuration.digest,
        evaluation.steps,
        evaluation.score,
        evaluation.status,
        evaluation.reason,
        evaluation.seconds,
        evaluation.checkpoint,
        json.dumps(asdict(evaluation.footprint)),
        json.dumps(evaluation.outcomes),
        candidate.phase,
        candidate.generation,
        candidate.origin,
        json.dumps(candidate.parents),
    )


def _record(row: tuple[Any, ...]) -> Record:
    position, text, steps, score, status, reason, seconds, checkpoint, footprint, outcomes, *provenance = row
    phase, generation, origin, parents = provenance
    configuration = Configuration.from_text(text)
    evaluation = Evaluation(
        configuration=configuration,
        steps=steps,
        score=-math.inf if status == "failed" else score,
        footprint=Footprint(**json.loads(footprint)),
        outcomes=tuple(json.loads(outcomes)),
        seconds=seconds,
        status=status,
        reason=reason,
        checkpoint=checkpoint,
    )
    return Record(position, Candidate(configuration, origin, tuple(json.loads(parents)), generation, phase), evaluation)
