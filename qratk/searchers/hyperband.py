"""Hyperband: random configurations, and brackets that hedge against misleading short runs (Li et al. 2018)."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from qratk.core.configuration import Configuration
from qratk.core.evaluation import Candidate, History
from qratk.searchers.base import searchers
from qratk.searchers.brackets import BracketSearcher


@searchers.register("hyperband")
class Hyperband(BracketSearcher):
    """Random feasible configurations in brackets that begin at each rung in turn (Li et al. 2018, Algorithm 1).

    See `BracketSearcher` for the brackets. Best with `generations` a multiple of the number of rungs.

    Args:
        offspring: candidates of the first bracket, the largest.
    """

    def __init__(self, offspring: int = 25) -> None:
        super().__init__(offspring)

    def proposals(
        self, history: History, rng: np.random.Generator, *, size: int, known: Collection[Configuration]
    ) -> tuple[Candidate, ...]:
        return ()  # all at random
