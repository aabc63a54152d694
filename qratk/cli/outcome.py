"""What a command says when it fails: one message, whatever was raised."""

from __future__ import annotations

import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, TextIO

from qratk.core.errors import QratkError

_NO_MEMORY: Final = re.compile(r"out of memory|cannot allocate memory|can't allocate memory|not enough memory", re.I)


# What jsonargparse says of a class that a configuration names and that raised when it was made.
_CLASS: Final = re.compile(r"Problem with given class_path '([^']+)': (.+?)(?= - Expected a| Given value|$)")


def told(error: BaseException) -> str:
    """The one message of an error: a user's mistake in its own words, anything else with what can be done."""
    known = next((link for link in chain(error) if isinstance(link, QratkError)), None)
    if known is not None:
        return str(known)
    notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
    return _foreign(error) + notes


@contextmanager
def threads_told() -> Iterator[None]:
    """Context in which a thread that fails, such as one that writes to a full disk, is told in one line."""

    def tell(failed: threading.ExceptHookArgs) -> None:
        if failed.exc_value is not None:
            print(f"qratk: warning: a thread beside the command failed: {told(failed.exc_value)}", file=sys.stderr)

    before, threading.excepthook = threading.excepthook, tell
    try:
        yield
    finally:
        threading.excepthook = before


@contextmanager
def warnings_told() -> Iterator[None]:
    """Context in which a warning is one line to a user, without the file and line of code that gave it."""

    def tell(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        print(f"qratk: warning: {' '.join(str(message).split())}", file=sys.stderr)

    before, warnings.showwarning = warnings.showwarning, tell
    try:
        yield
    finally:
        warnings.showwarning = before


def _foreign(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or _NO_MEMORY.search(text):
        return f"memory ran out: {text or type(error).__name__}. A smaller batch or max_length needs less of it."
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, ImportError):
        return f"a package is missing or broken: {text}"
    if match := _CLASS.search(text):
        return f"{match[1]} cannot be made: {match[2]}"
    return (
        f"{type(error).__name__}: {text or 'no text'}. "
        "This looks like a fault of qratk: QRATK_DEBUG=1 shows the traceback."
    )


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it was raised from."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__
