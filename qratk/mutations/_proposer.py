"""A proposal: draw an operator, vary a parent, repair, and try again when the result is known or rejected."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError, RejectedConfigurationError
from qratk.core.evaluation import Candidate
from qratk.core.problem import Problem
from qratk.mutations.base import MutationOperator
from qratk.repairs.base import RepairPolicy


@dataclass
class ProposalCounts:
    """How proposals fared, for the result file: proposed, infeasible before repair, rejected, known already."""

    proposed: int = 0
    infeasible: int = 0
    rejected: int = 0
    repeated: int = 0


@dataclass(frozen=True)
class Proposer:
    """Draws operators in equal parts (the paper mixes its two 1:1) and repairs what they return.

    Args:
        problem: the problem.
        mutations: the operators.
        repair: the repair policy.
        tries: how many proposals may fail (rejected or known already) before None is returned.
    """

    problem: Problem
    mutations: Sequence[MutationOperator]
    repair: RepairPolicy
    tries: int = 100
    counts: ProposalCounts = field(default_factory=ProposalCounts, compare=False)

    def __post_init__(self) -> None:
        if not self.mutations:
            raise ConfigurationError("at least one mutation operator is needed; the default is [sensitivity, coupled]")

    def repaired(self, configuration: Configuration) -> Configuration | None:
        """Feasible configuration, or None when the repair policy rejects it."""
        self.counts.proposed += 1
        self.counts.infeasible += not self.problem.feasible(configuration)
        try:
            return self.repair.repair(self.problem, configuration)
        except RejectedConfigurationError:
            self.counts.rejected += 1
            return None

    def vary(self, parent: Configuration, rng: np.random.Generator, edits: int = 1) -> tuple[Configuration, str] | None:
        """Feasible variant after `edits` mutations in a row and the operators' names; None when rejected."""
        names: list[str] = []
        child = parent
        for _ in range(edits):
            operator = self.mutations[int(rng.integers(len(self.mutations)))]
            child = operator.mutate(self.problem, child, rng)
            names.append(getattr(operator, "component_name", type(operator).__name__))
        repaired = self.repaired(child)
        return None if repaired is None else (repaired, "+".join(dict.fromkeys(names)))

    def propose(
        self,
        parent: Configuration,
        rng: np.random.Generator,
        *,
        known: Collection[Configuration] = (),
        generation: int = 0,
        phase: str = "global",
    ) -> Candidate | None:
        """New feasible candidate bred from a parent; after a quarter of the tries, edits are chained to get away."""
        for attempt in range(self.tries):
            varied = self.vary(parent, rng, edits=1 + 4 * attempt // self.tries)
            if varied is None:
                continue
            child, origin = varied
            if child not in known:
                return Candidate(child, origin, (parent.digest,), generation, phase)
            self.counts.repeated += 1
        return None
