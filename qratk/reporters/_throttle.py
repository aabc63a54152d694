"""A limit on the share of the time that pictures may take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Throttle:
    """Says when the next picture may be drawn, so that drawing takes about `share` of the time at most.

    A search on a toy problem ends a generation in milliseconds, and a resumed one replays hundreds in a second.
    """

    def __init__(self, share: float = 0.01, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._share = share
        self._clock = clock
        self._next = float("-inf")

    @property
    def ready(self) -> bool:
        """Whether enough time has passed since the last drawing."""
        return self._clock() >= self._next

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Measure how long the drawing inside takes."""
        start = self._clock()
        yield
        end = self._clock()
        self._next = end + (end - start) / self._share
