"""One cell in a worker process: the search command, its output in a file, its failure as a sentence."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from qratk.core.errors import QratkError
from qratk.core.secrets import text_without_secrets

INTERRUPTED = 130


@dataclass(frozen=True)
class Task:
    """A search to run: arguments of `qratk search`, the file of its output, whether all its own reporters are told."""

    arguments: tuple[str, ...]
    log: Path
    full_reports: bool = False


@dataclass(frozen=True)
class Answer:
    """How a task ended; `reason` is empty when it succeeded."""

    reason: str = ""
    interrupted: bool = False


def serve(connection: Connection) -> None:
    """Run tasks as they come, until the other end closes."""
    # Ctrl-C reaches all processes of a terminal: who waits for a task is told by the other end. Within a search the
    # command's own handler stands.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            task = connection.recv()
            connection.send(run_task(task))
        except (EOFError, BrokenPipeError):
            return


def run_task(task: Task) -> Answer:
    """What became of a search; whatever it prints is appended to the task's file."""
    with output_to(task.log):
        try:
            _search(task)
        except QratkError as error:
            print(f"qratk: error: {text_without_secrets(str(error))}", file=sys.stderr)
            return Answer(str(error))
        except SystemExit as stop:
            return _stopped(stop, task.log)
        except KeyboardInterrupt:
            return Answer("interrupted", interrupted=True)
        except Exception as error:
            traceback.print_exc()
            return Answer(f"{type(error).__name__}: {error}")
        finally:
            _release_memory()
    return Answer()


def _release_memory() -> None:
    """Let the model of this cell go before that of the next one comes."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _search(task: Task) -> None:
    from qratk.cli.search import search
    from qratk.reporters.files import RunFiles
    from qratk.reporters.terminal import TerminalReporter

    search(task.arguments, reporters=None if task.full_reports else (RunFiles(), TerminalReporter(plain=True)))


def _stopped(stop: SystemExit, log: Path) -> Answer:
    if stop.code in (0, None):
        return Answer()
    if stop.code == INTERRUPTED:
        return Answer("interrupted", interrupted=True)
    sys.stderr.flush()
    text = log.read_text(encoding="utf-8", errors="replace").rpartition("qratk: error: ")[2]
    return Answer(text.partition("\n(`qratk")[0].strip() or f"exit status {stop.code}")


@contextlib.contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Context in which standard output and error, those of libraries too, are appended to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    streams = (sys.stdout, sys.stderr)
    kept = [os.dup(number) for number in (1, 2)]
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        for number, stream in zip((1, 2), streams, strict=True):
            stream.flush()
            os.dup2(file, number)
        yield
    finally:
        for number, stream, old in zip((1, 2), streams, kept, strict=True):
            stream.flush()
            os.dup2(old, number)
            os.close(old)
        os.close(file)
