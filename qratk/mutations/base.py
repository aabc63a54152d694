"""The contract of mutation operators."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from qratk.core.configuration import Configuration
from qratk.core.problem import Problem
from qratk.registry import Registry


class MutationOperator(ABC):
    """Varies one configuration."""

    @abstractmethod
    def mutate(self, problem: Problem, configuration: Configuration, rng: np.random.Generator) -> Configuration:
        """Varied configuration on the ladders, feasible or not: the proposer repairs it afterwards.

        All randomness comes from `rng`. May return the configuration itself when no edit is possible.
        """

    def applies(self, problem: Problem) -> bool:
        """Whether there is anything for it to vary; the proposer leaves it out where not."""
        return True


class CrossoverOperator(MutationOperator):
    """Combines a configuration with a mate; registered among the mutations.

    The proposer calls `cross` while the searcher gives mates, and draws another operator where it gives none.
    """

    @abstractmethod
    def cross(
        self, problem: Problem, first: Configuration, second: Configuration, rng: np.random.Generator
    ) -> Configuration:
        """Child whose every choice is one of its parents', feasible or not. All randomness comes from `rng`."""

    def mutate(self, problem: Problem, configuration: Configuration, rng: np.random.Generator) -> Configuration:
        """The configuration itself: there is no mate."""
        return configuration


mutations: Registry[MutationOperator] = Registry("mutations", "MutationOperator")
