"""What refiners share that choose from a pool by the expected improvement under a Gaussian process."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qratk.core.configuration import Configuration
from qratk.core.evaluation import FidelityLadder, History
from qratk.core.utility import Utility
from qratk.mutations.proposer import Proposer
from qratk.refiners._capped import CappedRefiner
from qratk.refiners._measured import utilities
from qratk.refiners._pool import embed

if TYPE_CHECKING:
    from qratk.refiners._gaussian_process import Acquisition

Pool = dict[Configuration, int]
"""Configurations to choose from, each with the number of the region that it comes from."""


def gaussian_process() -> ModuleType:
    """The module of the Gaussian process, which imports BoTorch: loaded only when a proposal is made."""
    with warnings.catch_warnings():
        # linear_operator applies torch.jit.script on import, which torch 2.13 announces as deprecated.
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module("qratk.refiners._gaussian_process")


class ModelGuided(CappedRefiner):
    """Ranks pools by expected improvement (Eq. 12, 13, 16) over the utilities measured at the highest rung.

    A process that cannot be fitted is replaced by a random choice, and `fallbacks` says why. Diagnostics: log expected
    improvement, pool size, region, its radius, length-scale, fallback.
    """

    def __init__(self, max_evaluations: int, *, ard: bool, mix: float | None) -> None:
        super().__init__(max_evaluations)
        self.ard = ard
        self.mix = mix  # of the kernel for bits and ranks apart; None for the one kernel of Eq. 13

    def begin(self, proposer: Proposer, ladder: FidelityLadder, utility: Utility, history: History) -> None:
        """Forget everything."""
        super().begin(proposer, ladder, utility, history)
        self._best = 0.0  # what counts as an improvement when the last request was made
        self.fallbacks: list[str] = []

    def state(self) -> dict[str, Any]:
        """What counts as an improvement, and the fallbacks, besides the stop reason and diagnostics."""
        return {**super().state(), "best": self._best, "fallbacks": list(self.fallbacks)}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        super().restore(state)
        self._best = state["best"]
        self.fallbacks = list(state["fallbacks"])

    def _measured(self, history: History) -> list[tuple[Configuration, float]]:
        return utilities(self._proposer.problem, self._utility, history, self._ladder.highest)

    def _rank(
        self, history: History, candidates: Pool, rng: np.random.Generator
    ) -> tuple[list[int], NDArray[np.float64] | None]:
        """Order of the pool, best first, and the log EI of its members; a random order and None without a fit."""
        seed = int(rng.integers(2**31))
        measured = self._measured(history)
        members = list(candidates)
        space = self._proposer.problem.space
        values = np.array([value for _, value in measured])
        points = embed(space, [configuration for configuration, _ in measured])
        self._diagnostics = {"pool": float(len(members)), "best_utility": self._best, "fallback": 0.0}
        scores = self._scores(points, values, embed(space, members), seed=seed, extra=0)
        if scores is None:
            return [int(n) for n in rng.permutation(len(members))], None
        return self._ordered(members, scores), scores

    def _scores(
        self,
        points: NDArray[np.float64],
        utilities: NDArray[np.float64],
        members: NDArray[np.float64],
        *,
        seed: int,
        extra: int,
    ) -> NDArray[np.float64] | None:
        process = gaussian_process()
        try:
            acquisition: Acquisition = process.fit(
                points,
                utilities,
                best=self._best,
                seed=seed,
                ard=self.ard,
                extra=extra,
                mix=self.mix,
                layers=self._proposer.problem.num_layers,
            )
            scores = acquisition.log_ei(members)
        except process.FitError as error:
            self.fallbacks.append(f"evaluation {self._evaluations}: {error}")
            self._diagnostics["fallback"] = 1.0
            return None
        best = float(scores.max())
        self._diagnostics |= {
            "length_scale": acquisition.length_scale,
            "log_expected_improvement": max(best, -1e3),  # finite, for JSON and plots
            "expected_improvement": math.exp(min(best, 700.0)),
        }
        return scores

    def _ordered(self, members: Sequence[Configuration], scores: NDArray[np.float64]) -> list[int]:
        """Numbers of the members by descending score; ties by footprint, then by configuration."""
        problem = self._proposer.problem
        # Only exact ties need the bytes: computing them for a whole pool would cost more than the fit.
        order = sorted(range(len(members)), key=lambda n: -scores[n])
        value, repeats = np.unique(scores, return_counts=True)
        if not (repeats > 1).any():
            return order
        tied = set(value[repeats > 1].tolist())
        bytes_of = {n: problem.bytes(members[n]) if scores[n] in tied else 0 for n in order}
        return sorted(order, key=lambda n: (-scores[n], bytes_of[n], members[n]))
