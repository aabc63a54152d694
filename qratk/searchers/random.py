"""Random search: the control that any guided search has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from qratk.core.configuration import Configuration
from qratk.core.edits import DEFAULT_EPSILON
from qratk.core.errors import ConfigurationError
from qratk.core.evaluation import Candidate, Evaluation, FidelityLadder, History
from qratk.mutations._proposer import Proposer
from qratk.searchers._warm_start import initial_candidates, random_candidates
from qratk.searchers.base import GlobalSearcher, searchers


@searchers.register("random")
class RandomSearch(GlobalSearcher):
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
        if around not in ("space", "prototype") or not epsilon > 0:
            raise ConfigurationError(
                f"around must be 'space' or 'prototype' and epsilon positive, got {around!r} and {epsilon}"
            )
        self.around = around
        self.epsilon = epsilon
        if offspring < 1:
            raise ConfigurationError(f"offspring must be at least 1, got {offspring}")
        self.offspring = offspring
        self._proposer: Proposer | None = None
        self._generation = 0
        self._exhausted = False

    def begin(self, proposer: Proposer, ladder: FidelityLadder) -> None:
        """Forget everything."""
        self._proposer = proposer
        self._generation = 0
        self._exhausted = False

    def ask(self, history: History, rng: np.random.Generator) -> tuple[Candidate, ...]:
        """Random feasible candidates that the history does not hold."""
        assert self._proposer is not None, "begin comes before ask"
        known = {evaluation.configuration for evaluation in history}
        found = self._edited(known, rng) if self.around == "prototype" else ()
        found += random_candidates(
            self._proposer.problem,
            rng,
            size=self.offspring - len(found),
            generation=self._generation,
            known={*known, *(c.configuration for c in found)},
        )
        self._exhausted = not found
        return found

    def _edited(self, known: set[Configuration], rng: np.random.Generator) -> tuple[Candidate, ...]:
        """Prototypes and random edits of them, most places to the first: the paper's."""
        assert self._proposer is not None
        return initial_candidates(
            self._proposer, rng, size=self.offspring, epsilon=self.epsilon, known=known, uniforms=False
        )

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Results do not matter here."""
        self._generation += 1

    @property
    def finished(self) -> bool:
        """Whether nothing new was found."""
        return self._exhausted

    @property
    def generation_size(self) -> int:
        """`offspring`."""
        return self.offspring

    def state(self) -> dict[str, Any]:
        """The generation's number."""
        return {"generation": self._generation, "exhausted": self._exhausted}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self._generation = int(state["generation"])
        self._exhausted = bool(state["exhausted"])
