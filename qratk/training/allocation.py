"""Memory that a step frees, kept for the next step: glibc would return it, and get it anew page by page."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from typing import Final

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, in malloc.h
_MAPPED_FROM: Final = 1 << 30  # bytes of a block that is still mapped and unmapped by itself
_KEPT: Final = (1 << 31) - 1  # the largest number that mallopt takes
_OWN: Final = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


@functools.cache
def keep_freed_memory() -> bool:
    """Have this process's allocator keep up to 2 GiB of freed memory; whether it does.

    A step makes tensors of the same sizes again and again, some of them larger than glibc keeps by itself: the kernel
    then clears their pages each time. Results are the same to the bit. Nothing happens with another C library, or
    where the environment says how the allocator shall behave.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _OWN):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _MAPPED_FROM)) and bool(mallopt(_TRIM_THRESHOLD, _KEPT))
