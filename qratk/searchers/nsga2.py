"""The paper's global search: NSGA-II over score and bytes, warm-started by importance (section 3.2)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from qratk.core.configuration import Configuration, unique
from qratk.core.edits import DEFAULT_EPSILON
from qratk.core.errors import ConfigurationError
from qratk.core.evaluation import Candidate, Evaluation, FidelityLadder, History
from qratk.mutations._proposer import Proposer
from qratk.searchers._additive import AdditiveModel
from qratk.searchers._integer_program import best_choice
from qratk.searchers._survival import Member, survivors
from qratk.searchers._warm_start import initial_candidates, random_candidates
from qratk.searchers.base import GlobalSearcher, searchers

MATES = 8
"""Mates drawn for a child, of which the proposer takes one a try."""


@searchers.register("nsga2")
class NSGA2(GlobalSearcher):
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
        model_share: float = 0.3,
    ) -> None:
        if population < 2 or offspring < 1:
            raise ConfigurationError(
                f"population must be at least 2 and offspring at least 1, got {population} and {offspring}"
            )
        if not 0 <= model_share <= 1:
            raise ConfigurationError(f"model_share must lie in [0, 1], got {model_share}")
        if not epsilon > 0:
            raise ConfigurationError(f"epsilon must be positive, got {epsilon}")
        self.population = population
        self.offspring = offspring
        self.warm_start = warm_start
        self.epsilon = epsilon
        self.solved_prototypes = solved_prototypes
        self.model_share = model_share
        self._proposer: Proposer | None = None
        self._members: tuple[Member, ...] = ()
        self._generation = 0
        self._uniforms: tuple[Configuration, ...] = ()
        self._exhausted = False

    def begin(self, proposer: Proposer, ladder: FidelityLadder) -> None:
        """Forget everything."""
        self._proposer = proposer
        self._ladder = ladder
        self._members, self._generation, self._uniforms, self._exhausted = (), 0, (), False

    def ask(self, history: History, rng: np.random.Generator) -> tuple[Candidate, ...]:
        """The initial population first, prototypes before all; later the children of tournament winners."""
        self._take_in_baselines(history)
        known = {evaluation.configuration for evaluation in history}
        candidates = self._initial(known, rng) if self._generation == 0 else self._children(history, known, rng)
        self._exhausted = not candidates
        return candidates

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Parents and children compete for the places of the population."""
        uniforms = set(self._begun.problem.space.uniforms())
        self._note_uniforms(e.configuration for e in evaluations if e.configuration in uniforms)
        self._survive(evaluations)
        self._generation += 1

    @property
    def finished(self) -> bool:
        """Whether nothing new could be proposed."""
        return self._exhausted

    @property
    def generation_size(self) -> int:
        """`offspring`."""
        return self.offspring

    def state(self) -> dict[str, Any]:
        """The population with ranks and crowding, the generation, and the uniform configurations seen."""
        return {
            "generation": self._generation,
            "population": [member.to_plain() for member in self._members],
            "uniforms": [str(configuration) for configuration in self._uniforms],
            "exhausted": self._exhausted,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        problem = self._begun.problem
        self._generation = int(state["generation"])
        self._members = tuple(Member.from_plain(plain, problem) for plain in state["population"])
        self._uniforms = tuple(Configuration.from_text(text) for text in state["uniforms"])
        self._exhausted = bool(state["exhausted"])

    @property
    def _begun(self) -> Proposer:
        assert self._proposer is not None, "begin comes first"
        return self._proposer

    def _survive(self, evaluations: Sequence[Evaluation]) -> None:
        new = [Member.of(evaluation, self._begun.problem) for evaluation in evaluations]
        self._members = survivors([*self._members, *new], self.population)

    def _take_in_baselines(self, history: History) -> None:
        """Let uniform configurations join that someone else had measured: they were never told."""
        strangers = set(self._begun.problem.space.uniforms()) - set(self._uniforms)
        found = [evaluation for evaluation in history if evaluation.configuration in strangers]
        if found:
            self._note_uniforms(evaluation.configuration for evaluation in found)
            self._survive(found)

    def _note_uniforms(self, configurations: Iterable[Configuration]) -> None:
        self._uniforms = unique((*self._uniforms, *configurations))

    def _initial(self, known: set[Configuration], rng: np.random.Generator) -> tuple[Candidate, ...]:
        if not self.warm_start:
            return self._random(known, rng, self.offspring)
        found = initial_candidates(
            self._begun, rng, size=self.offspring, epsilon=self.epsilon, known=known, solved=self.solved_prototypes
        )
        missing = self.offspring - len(found)
        return found + self._random({*known, *(c.configuration for c in found)}, rng, missing)

    def _children(self, history: History, known: set[Configuration], rng: np.random.Generator) -> tuple[Candidate, ...]:
        children = self._imagined(history, known, rng)
        while len(children) < self.offspring:
            child = self._child({*known, *children}, rng)
            if child is None:  # nothing new near the parents: look elsewhere for the rest of the generation
                break
            children[child.configuration] = child
        missing = self.offspring - len(children)
        return tuple(children.values()) + self._random({*known, *children}, rng, missing)

    def _imagined(
        self, history: History, known: set[Configuration], rng: np.random.Generator
    ) -> dict[Configuration, Candidate]:
        """New configurations that are best for draws from the additive model."""
        found: dict[Configuration, Candidate] = {}
        wanted = round(self.model_share * self.offspring)
        model = AdditiveModel(self._begun.problem, history, self._ladder.steps) if wanted else None
        for _ in range(3 * wanted):
            if model is None or not model.ready or len(found) == wanted:
                break
            configuration = best_choice(self._begun.problem, model.values(rng), exact=False)
            if configuration not in known:
                found.setdefault(configuration, Candidate(configuration, "additive", generation=self._generation))
        return found

    def _child(self, taken: set[Configuration], rng: np.random.Generator) -> Candidate | None:
        if not self._members:
            return None
        parent = self._tournament(rng)
        return self._begun.propose(
            parent.configuration, rng, known=taken, mates=self._mates(rng), generation=self._generation
        )

    def _mates(self, rng: np.random.Generator) -> tuple[Configuration, ...]:
        """Winners of tournaments, where an operator wants mates: several, for one child of a pair may be known."""
        size = MATES if self._begun.crosses else 0
        return tuple(self._tournament(rng).configuration for _ in range(size))

    def _tournament(self, rng: np.random.Generator) -> Member:
        """The better of two members drawn at random: lower front, then emptier region, then the first drawn."""
        pair = rng.choice(len(self._members), size=min(2, len(self._members)), replace=False)
        return min((self._members[int(i)] for i in pair), key=lambda member: (member.rank, -member.crowding))

    def _random(self, known: set[Configuration], rng: np.random.Generator, size: int) -> tuple[Candidate, ...]:
        return random_candidates(self._begun.problem, rng, size=size, generation=self._generation, known=known)
