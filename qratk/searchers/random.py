"""Random search: the control that any guided search has to beat."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import numpy as np

from qratk.core.configuration import Configuration
from qratk.core.edits import DEFAULT_EPSILON
from qratk.core.errors import ConfigurationError
from qratk.core.evaluation import Candidate, History
from qratk.searchers._warm_start import initial_candidates, leading_shared
from qratk.searchers.base import searchers
from qratk.searchers.generations import GenerationSearcher


@searchers.register("random")
class RandomSearch(GenerationSearcher):
    """Proposes random feasible configurations, uniformly where the budget allows (see `sample_feasible`).

    Args:
        offspring: candidates a generation.
        around: "space", or "prototype": the importance-shaped prototypes of the warm start first (Eq. 6), then random
            edits of these. The control that shows what a search adds to its start.
        epsilon: added to the normalised importance in the prototypes.
    """

    def __init__(
        self, offspring: int = 25, around: Literal["space", "prototype"] = "space", epsilon: float = DEFAULT_EPSILON
    ) -> None:
        super().__init__(offspring)
        if around not in ("space", "prototype") or not epsilon > 0:
            raise ConfigurationError(
                f"around must be 'space' or 'prototype' and epsilon positive, got {around!r} and {epsilon}"
            )
        self.around = around
        self.epsilon = epsilon

    def proposals(
        self, history: History, rng: np.random.Generator, *, size: int, known: Collection[Configuration]
    ) -> tuple[Candidate, ...]:
        """Prototypes and random edits of them, most places to the first, the paper's; none around "space"."""
        if self.around == "space":
            return ()
        shared = leading_shared(self.proposer.problem, history)
        return initial_candidates(
            self.proposer, rng, size=size, epsilon=self.epsilon, known=known, uniforms=False, shared=shared
        )
