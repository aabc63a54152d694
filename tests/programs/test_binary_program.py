"""The integer-program solver: its answer against brute force, and that it prints nothing."""

from __future__ import annotations

import itertools
import os

import numpy as np
import pytest
from scipy.optimize import LinearConstraint

from qratk.programs.binary import least_binary


def test_answer_is_the_best_of_all_subsets() -> None:
    rng = np.random.default_rng(0)
    cost, size = -rng.random(10), rng.random(10)
    found = least_binary(cost, [LinearConstraint(size[None], ub=2.0)], gap=0.0)
    subsets = (np.array(taken) for taken in itertools.product((0.0, 1.0), repeat=10))
    least = min(cost @ taken for taken in subsets if size @ taken <= 2.0)
    assert found is not None
    assert cost @ np.round(found) == pytest.approx(least)


def test_no_answer_within_the_constraints_is_none() -> None:
    assert least_binary(np.ones(3), [LinearConstraint(np.ones((1, 3)), lb=4.0)], gap=0.0) is None


def test_what_c_code_prints_during_the_solution_does_not_reach_the_terminal(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ctypes

    import scipy.optimize

    def chatty(cost: np.ndarray, **_: object) -> object:
        ctypes.CDLL(None).puts(b"printed by C")
        os.write(1, b"written to the descriptor\n")
        return scipy.optimize.OptimizeResult(x=np.zeros(len(cost)))

    monkeypatch.setattr(scipy.optimize, "milp", chatty)
    ctypes.CDLL(None).puts(b"before")
    least_binary(np.ones(2), [], gap=0.0)
    print("after", flush=True)
    ctypes.CDLL(None).fflush(None)
    assert capfd.readouterr().out.split() == ["before", "after"]
