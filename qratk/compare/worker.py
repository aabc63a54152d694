"""One cell in a worker process: the search command, its output in a file, its failure as a sentence."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from qratk.core.errors import CommandLineError, QratkError
from qratk.core.secrets import text_without_secrets

if TYPE_CHECKING:
    from qratk.reporters.base import Reporter

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


class Search(Protocol):
    """The command `qratk search`."""

    def __call__(self, arguments: Sequence[str], *, reporters: Sequence[Reporter] | None = None) -> object:
        """Run it; raises what a command raises."""


def serve(connection: Connection, *, search: Search) -> None:
    """Run tasks as they come, until the other end closes."""
    # Ctrl-C reaches all processes of a terminal: who waits for a task is told by the other end. Within a search the
    # command's own handler stands.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            task = connection.recv()
            connection.send(run_task(task, search))
        except (EOFError, BrokenPipeError):
            return


def run_task(task: Task, search: Search) -> Answer:
    """What became of a search; whatever it prints is appended to the task's file."""
    with output_to(task.log):
        try:
            search(task.arguments, reporters=_reporters(task))
        except QratkError as error:
            print(f"qratk: error: {text_without_secrets(str(error))}", file=sys.stderr)
            return Answer(str(error))
        except SystemExit as stop:
            return stopped(stop)
        except KeyboardInterrupt:
            return Answer("interrupted", interrupted=True)
        except Exception as error:
            print(text_without_secrets(traceback.format_exc()), end="", file=sys.stderr)
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


def _reporters(task: Task) -> tuple[Reporter, ...] | None:
    from qratk.reporters.files import RunFiles
    from qratk.reporters.terminal import TerminalReporter

    return None if task.full_reports else (RunFiles(), TerminalReporter(plain=True))


def stopped(stop: SystemExit) -> Answer:
    """What the exit of a command says."""
    if isinstance(stop, CommandLineError):
        return Answer(stop.message)
    if stop.code == INTERRUPTED:
        return Answer("interrupted", interrupted=True)
    return Answer() if stop.code in (0, None) else Answer(f"exit status {stop.code}")


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
