"""What takes long tells how far it is; whoever listens shows it. Without a listener nothing happens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Work:
    """How far a piece of work is.

    Attributes:
        what: a phrase such as "packing weights".
        done: items that are done.
        total: items in all; None where that is not known.
        seconds: since it began.
    """

    what: str
    done: int
    total: int | None
    seconds: float

    @property
    def over(self) -> bool:
        """Whether all of it is done."""
        return self.total is not None and self.done >= self.total

    @property
    def seconds_left(self) -> float | None:
        """At the rate so far; None before the first item, or where the total is not known."""
        if self.total is None or not self.done:
            return None
        return self.seconds / self.done * (self.total - self.done)


Listener = Callable[[Work], None]

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


def tell(work: Work) -> None:
    """Tell the listener, if there is one."""
    if (listener := _listener.get()) is not None:
        listener(work)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Context in which a listener is told of all work, in the place of any other."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def counted(what: str, items: Iterable[T], total: int | None = None) -> Iterator[T]:
    """The items one after another; each is done when the next is asked for. The total is that of a sequence."""
    total = len(items) if total is None and isinstance(items, Sequence) else total
    began = time.monotonic()
    done = 0
    tell(Work(what, done, total, 0.0))
    for item in items:
        yield item
        done += 1
        tell(Work(what, done, total, time.monotonic() - began))
    if total is None or done < total:
        tell(Work(what, done, done, time.monotonic() - began))


@contextmanager
def working(what: str) -> Iterator[None]:
    """Context of work that cannot be counted."""
    began = time.monotonic()
    tell(Work(what, 0, None, 0.0))
    try:
        yield
    finally:
        tell(Work(what, 1, 1, time.monotonic() - began))
