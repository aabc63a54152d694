"""Integer programs with binary unknowns, by HiGHS as scipy holds it."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from scipy.optimize import LinearConstraint

Array = NDArray[np.float64]

NODES = 1000


def least_binary(cost: Array, constraints: Sequence[LinearConstraint], *, gap: float) -> Array | None:
    """Values in [0, 1], (n,), whole but for the solver's tolerance, of least cost (n,); None when it finds none.

    The solver stops at the relative `gap`, or after `NODES` nodes.
    """
    from scipy.optimize import Bounds, milp

    with _without_c_output():
        solution = milp(
            cost,
            integrality=np.ones(len(cost)),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": gap, "node_limit": NODES},
        )
    return None if solution.x is None else np.asarray(solution.x)


@contextmanager
def _without_c_output() -> Iterator[None]:
    """Keep what C code prints from the terminal.

    HiGHS prints "HighsMipSolverData::transformNewIntegerFeasibleSolution tmpSolver.run();" now and then, whatever its
    options say. C holds its output back until its buffer is full, so it is flushed while it still goes nowhere.
    """
    try:
        kept = os.dup(1)
    except OSError:  # there is no standard output
        yield
        return
    with suppress(OSError, ValueError, AttributeError):  # closed, or None where Python was started without a terminal
        sys.stdout.flush()
    _flush_c()
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        _flush_c()
        os.dup2(kept, 1)
        os.close(kept)


def _flush_c() -> None:
    with suppress(OSError, AttributeError, TypeError):  # not on every system is the C library found like this
        ctypes.CDLL(None).fflush(None)
