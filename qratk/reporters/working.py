"""Work in progress as text: one line that is written over on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO

from qratk.core.text import clean, duration
from qratk.core.work import Work

_BETWEEN_LINES = (10.0, 60.0)  # seconds, the least and the most
_BETWEEN_REDRAWS = 0.1


def work_text(work: Work) -> str:
    """How far work is, in a phrase: "packing weights: 12/60, about 40 s left"."""
    if work.total is None:
        return f"{clean(work.what)} ..."
    text = f"{clean(work.what)}: {work.done}/{work.total}"
    if work.over:
        return f"{text}, {duration(work.seconds)}"
    return text if work.seconds_left is None else f"{text}, about {duration(work.seconds_left)} left"


class WorkLines:
    """A listener that writes to a stream.

    On a terminal the line is drawn again and again, and gone when the work is over. Elsewhere a line is written when
    work has gone on for ten seconds, and again when it has taken twice as long, at least every minute; what is short
    is not told.

    Args:
        stream: where to.
        overwriting: whether the stream is a terminal whose cursor can be moved.
    """

    def __init__(self, stream: TextIO, *, overwriting: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._overwriting = overwriting
        self._clock = clock
        self._what = ""
        self._next = 0.0
        self._drawn = 0

    def __call__(self, work: Work) -> None:
        """Show it, where it is time to."""
        if work.what != self._what:
            self.clear()
            self._what, self._next = work.what, self._clock() + (0.0 if self._overwriting else _BETWEEN_LINES[0])
        if self._overwriting:
            self._draw(work)
        elif self._clock() >= self._next:
            least, most = _BETWEEN_LINES
            self._next = self._clock() + min(most, max(least, work.seconds))
            self._write(work_text(work) + "\n")
        if work.over:
            self.clear()

    def clear(self) -> None:
        """Take the line away."""
        if self._drawn:
            self._write("\r" + " " * self._drawn + "\r")
        self._drawn, self._what = 0, ""

    def _draw(self, work: Work) -> None:
        if self._clock() < self._next:
            return
        text = work_text(work)[:78]
        self._write("\r" + text + " " * (self._drawn - len(text)))
        self._drawn, self._next = len(text), self._clock() + _BETWEEN_REDRAWS

    def _write(self, text: str) -> None:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._stream.write(text.encode(encoding, "replace").decode(encoding))
        self._stream.flush()
