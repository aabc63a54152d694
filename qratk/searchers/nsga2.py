"""The paper's global search: NSGA-II over score and bytes, warm-started by importance (section 3.2)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np

from qratk.core.configuration import Configuration, unique
from qratk.core.edits import DEFAULT_EPSILON
from qratk.core.errors import ConfigurationError
from qratk.core.evaluation import Candidate, Evaluation, FidelityLadder, History
from qratk.mutations.proposer import Proposer
from qratk.programs.integer import best_choice
from qratk.searchers._additive import AdditiveModel
from qratk.searchers._evolution import EvolutionSearcher
from qratk.searchers._survival import Member, survivors
from qratk.searchers.base import searchers

MATES = 8
"""Mates drawn for a child, of which the proposer takes one a try."""


@searchers.register("nsga2")
class NSGA2(EvolutionSearcher):
    """Breeds from the non-dominated: binary tournaments, mutation by the proposer, rung-major survival.

    Sorting and crowding are pymoo's; the population is our own plain data, for pymoo's pickles do not survive a
    change of version. Crossover operators among the mutations get mates by tournament as well (the paper has no
    crossover, and neither has the default recipe). Uniform configurations that the loop measured as baselines join the
    population.

    Args:
        population: how many survive a generation.
        offspring: candidates a generation, N_LF.
        warm_start: start from importance-shaped prototypes (Eq. 6); else at random.
        epsilon: added to the normalised importance in the warm start.
        solved_prototypes: start from integer programs over the importances, too.
        model_share: share of the later generations that comes from an additive model of all that was measured: the best
            configurations of draws from its posterior (`qratk.searchers._additive`). The paper has no such thing.
    """

    def __init__(
        self,
        population: int = 40,
        offspring: int = 25,
        warm_start: bool = True,
        epsilon: float = DEFAULT_EPSILON,
        solved_prototypes: bool = True,
        model_share: float = 0.6,
    ) -> None:
        super().__init__(offspring, warm_start=warm_start, epsilon=epsilon, solved_prototypes=solved_prototypes)
        if population < 2:
            raise ConfigurationError(f"population must be at least 2, got {population}")
        if not 0 <= model_share <= 1:
            raise ConfigurationError(f"model_share must lie in [0, 1], got {model_share}")
        self.population = population
        self.model_share = model_share
        self._uniforms: tuple[Configuration, ...] = ()

    def begin(self, proposer: Proposer, ladder: FidelityLadder) -> None:
        """Forget everything."""
        super().begin(proposer, ladder)
        self._uniforms = ()

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Parents and children compete for the places of the population."""
        space = self.proposer.problem.space
        self._note_uniforms(e.configuration for e in evaluations if space.is_uniform(e.configuration))
        self._survive(evaluations)
        super().tell(evaluations)

    def state(self) -> dict[str, Any]:
        """The population with ranks and crowding, the generation, and the uniform configurations seen."""
        return super().state() | {
            "population": [member.to_plain() for member in self._members],
            "uniforms": [str(configuration) for configuration in self._uniforms],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        super().restore(state)
        self._members = tuple(Member.from_plain(plain, self.proposer.problem) for plain in state["population"])
        self._uniforms = tuple(Configuration.from_text(text) for text in state["uniforms"])

    def _survive(self, evaluations: Sequence[Evaluation]) -> None:
        new = [Member.of(evaluation, self.proposer.problem) for evaluation in evaluations]
        self._members = survivors([*self._members, *new], self.population)

    def _take_in_baselines(self, history: History) -> None:
        """Let uniform configurations join that someone else had measured: they were never told."""
        space, known = self.proposer.problem.space, set(self._uniforms)
        found = [e for e in history if e.configuration not in known and space.is_uniform(e.configuration)]
        if found:
            self._note_uniforms(evaluation.configuration for evaluation in found)
            self._survive(found)

    def _note_uniforms(self, configurations: Iterable[Configuration]) -> None:
        self._uniforms = unique((*self._uniforms, *configurations))

    def _children(
        self, history: History, rng: np.random.Generator, *, size: int, known: Collection[Configuration]
    ) -> tuple[Candidate, ...]:
        imagined = self._imagined(history, rng, size=round(self.model_share * size), known=known)
        taken = {*known, *(candidate.configuration for candidate in imagined)}
        return imagined + super()._children(history, rng, size=size - len(imagined), known=taken)

    def _imagined(
        self, history: History, rng: np.random.Generator, *, size: int, known: Collection[Configuration]
    ) -> tuple[Candidate, ...]:
        """New configurations that are best for draws from the additive model."""
        found: dict[Configuration, Candidate] = {}
        model = AdditiveModel(self.proposer.problem, history, self.ladder.steps) if size else None
        for _ in range(3 * size):
            if model is None or not model.ready or len(found) == size:
                break
            values, shared = model.drawn(rng)
            best = best_choice(self.proposer.problem, values, shared=shared, exact=False)
            configuration = self.proposer.filled(best)
            if configuration not in known:
                found.setdefault(configuration, Candidate(configuration, "additive", generation=self.generation))
        return tuple(found.values())

    def _mates(self, rng: np.random.Generator) -> tuple[Configuration, ...]:
        """Winners of tournaments, where an operator wants mates: several, for one child of a pair may be known."""
        size = MATES if self.proposer.crosses else 0
        return tuple(self._tournament(rng).configuration for _ in range(size))

    def _tournament(self, rng: np.random.Generator) -> Member:
        """The better of two members drawn at random: lower front, then emptier region, then the first drawn."""
        pair = rng.choice(len(self._members), size=min(2, len(self._members)), replace=False)
        return min((self._members[int(i)] for i in pair), key=lambda member: (member.rank, -member.crowding))
