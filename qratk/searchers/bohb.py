"""BOHB: the brackets of Hyperband, proposals by a model of good and bad configurations (Falkner et al. 2018)."""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np

from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError
from qratk.core.evaluation import Candidate, History
from qratk.searchers._kernel_density import LadderDensity, importance_bandwidths
from qratk.searchers.base import searchers
from qratk.searchers.brackets import BracketSearcher

REPAIRED = 8
"""Drawn configurations that are repaired for one proposal; the best of them by density ratio is proposed."""


@searchers.register("bohb")
class BOHB(BracketSearcher):
    """Draws from the density of good configurations what is most likely under it against that of the bad ones.

    Both densities are products over knobs of kernel estimates on the ladders (TPE), from all measurements at the
    highest rung that has enough of them. The paper's joint kernel needs more points than knobs, of which there are 2 L
    here. A layer's bandwidth shrinks with its importance: what matters is imitated closely, what does not is varied.
    A failure counts as bad. See `BracketSearcher` for the brackets.

    Args:
        offspring: candidates of the first bracket, the largest.
        random_fraction: share of the candidates drawn at random, rho.
        good_fraction: share of the measurements that counts as good, q.
        min_points: so many good and so many bad measurements make a rung's model.
        samples: draws from the good density for one proposal.
        narrow, wide: bandwidths of the most and the least important layer, in (0, 1).
    """

    def __init__(
        self,
        offspring: int = 25,
        random_fraction: float = 1 / 3,
        good_fraction: float = 0.25,
        min_points: int = 4,
        samples: int = 64,
        narrow: float = 0.1,
        wide: float = 0.4,
    ) -> None:
        super().__init__(offspring)
        if not (0 <= random_fraction <= 1 and 0 < good_fraction < 1):
            raise ConfigurationError(
                "bohb: random_fraction must lie in [0, 1] and good_fraction in (0, 1), "
                f"got {random_fraction} and {good_fraction}"
            )
        if min_points < 1 or samples < 1 or not 0 < narrow <= wide < 1:
            raise ConfigurationError(
                "bohb: min_points and samples must be at least 1 and 0 < narrow <= wide < 1, "
                f"got {min_points}, {samples}, {narrow} and {wide}"
            )
        self.random_fraction = random_fraction
        self.good_fraction = good_fraction
        self.min_points = min_points
        self.samples = samples
        self.narrow = narrow
        self.wide = wide

    def proposals(
        self, history: History, rng: np.random.Generator, *, size: int, known: Collection[Configuration]
    ) -> tuple[Candidate, ...]:
        split = self._split(history)
        if split is None:
            return ()
        problem = self.proposer.problem
        bandwidths = importance_bandwidths(problem, self.narrow, self.wide)
        good, bad = (LadderDensity.of(problem, part, bandwidths) for part in split)
        chosen: dict[Configuration, Candidate] = {}
        for _ in range(int(np.sum(rng.random(size) >= self.random_fraction))):
            found = self._proposal(good, bad, rng, known={*known, *chosen})
            if found is not None:
                chosen[found] = Candidate(found, "bohb", generation=self.generation)
        return tuple(chosen.values())

    def _split(self, history: History) -> tuple[list[Configuration], list[Configuration]] | None:
        """Good and bad configurations at the highest rung with enough points, by score; None when there is none."""
        for steps in reversed(self.ladder.steps):
            measured = [e for e in history if e.steps == steps and e.configuration in self.proposer.problem.space]
            if len(measured) < 2 * self.min_points:
                continue
            ranked = [e.configuration for e in sorted(measured, key=lambda e: -e.score)]  # failures (-inf) last
            good = max(self.min_points, math.ceil(self.good_fraction * len(ranked)))
            good = min(good, len(ranked) - self.min_points)
            return ranked[:good], ranked[good:]
        return None

    def _proposal(
        self, good: LadderDensity, bad: LadderDensity, rng: np.random.Generator, *, known: Collection[Configuration]
    ) -> Configuration | None:
        """The new feasible configuration of largest density ratio among the draws, None when all are known."""
        space = self.proposer.problem.space
        drawn, shared = good.sample(self.samples, rng)
        order = np.argsort(bad.log_density(drawn, shared) - good.log_density(drawn, shared), kind="stable")
        wanted = (space.from_indices(drawn[n], space.shared_at(shared[n])) for n in order[:REPAIRED])
        repaired = (self.proposer.repaired(configuration) for configuration in wanted)
        fresh = [c for c in repaired if c is not None and c not in known]
        if not fresh:
            return None
        points = np.array([space.indices(c) for c in fresh]), np.array([space.shared_indices(c) for c in fresh])
        return fresh[int(np.argmax(good.log_density(*points) - bad.log_density(*points)))]
