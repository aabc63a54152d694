"""Evolution: generations bred from the winners of tournaments, after a warm start."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection

import numpy as np

from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError
from qratk.core.evaluation import Candidate, FidelityLadder, History
from qratk.mutations.proposer import Proposer
from qratk.searchers._survival import Member
from qratk.searchers._warm_start import initial_candidates, leading_shared
from qratk.searchers.generations import GenerationSearcher


class EvolutionSearcher(GenerationSearcher):
    """Keeps members, of which tournaments draw the parents of the next generation.

    A strategy writes who wins a tournament (`_tournament`), who dies (`tell`) and which measurements of before the
    search join the members (`_take_in_baselines`); it saves the members with its `state`.
    """

    def __init__(self, offspring: int, *, warm_start: bool, epsilon: float, solved_prototypes: bool = False) -> None:
        super().__init__(offspring)
        if not epsilon > 0:
            raise ConfigurationError(f"epsilon must be positive, got {epsilon}")
        self.warm_start = warm_start
        self.epsilon = epsilon
        self.solved_prototypes = solved_prototypes
        self._members: tuple[Member, ...] = ()

    def begin(self, proposer: Proposer, ladder: FidelityLadder) -> None:
        """Forget everything."""
        super().begin(proposer, ladder)
        self._members = ()

    def proposals(
        self, history: History, rng: np.random.Generator, *, size: int, known: Collection[Configuration]
    ) -> tuple[Candidate, ...]:
        """The initial population first, prototypes before all; later the children of tournament winners."""
        self._take_in_baselines(history)
        if self.generation > 0:
            return self._children(history, rng, size=size, known=known)
        if not self.warm_start:
            return ()
        return initial_candidates(
            self.proposer,
            rng,
            size=size,
            epsilon=self.epsilon,
            known=known,
            solved=self.solved_prototypes,
            shared=leading_shared(self.proposer.problem, history),
        )

    def _children(
        self, history: History, rng: np.random.Generator, *, size: int, known: Collection[Configuration]
    ) -> tuple[Candidate, ...]:
        children: dict[Configuration, Candidate] = {}
        while self._members and len(children) < size:
            parent, mates = self._tournament(rng).configuration, self._mates(rng)
            child = self.proposer.propose(
                parent, rng, known={*known, *children}, mates=mates, generation=self.generation
            )
            if child is None:  # nothing new near the winners: the rest of the generation is drawn at random
                break
            children[child.configuration] = child
        return tuple(children.values())

    @abstractmethod
    def _take_in_baselines(self, history: History) -> None:
        """Let members join that someone else had measured: they are never told."""

    @abstractmethod
    def _tournament(self, rng: np.random.Generator) -> Member:
        """The winner among members drawn at random; there is at least one member."""

    def _mates(self, rng: np.random.Generator) -> tuple[Configuration, ...]:
        """Mates for a child, of which the proposer takes one a try; none by default."""
        return ()
