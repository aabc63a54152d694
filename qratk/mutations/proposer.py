"""A proposal: draw an operator, vary a parent, repair, and try again when the result is known or rejected."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np

from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError, RejectedConfigurationError
from qratk.core.evaluation import Candidate
from qratk.core.problem import Problem
from qratk.mutations.base import CrossoverOperator, MutationOperator
from qratk.repairs.base import RepairPolicy


@dataclass
class ProposalCounts:
    """How proposals fared, for the result file: proposed, infeasible before repair, rejected, known already.

    `repaired_bits` and `repaired_rank` say by how many rungs repair lowered each layer, (L,), in sum over all
    proposals: the repair intensity of Fig. 8.
    """

    proposed: int = 0
    infeasible: int = 0
    rejected: int = 0
    repeated: int = 0
    repaired_bits: list[int] = field(default_factory=list)
    repaired_rank: list[int] = field(default_factory=list)

    def state(self) -> dict[str, Any]:
        """All counts as plain data."""
        return asdict(self)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Count on from a saved state, in place: whoever holds these counts sees it."""
        for item in fields(self):
            value = state[item.name]
            setattr(self, item.name, [int(n) for n in value] if isinstance(value, Sequence) else int(value))


@dataclass(frozen=True)
class Proposer:
    """Draws operators in equal parts (the paper mixes its two 1:1) and repairs what they return.

    Crossover operators are drawn where mates are given, and left out where there are none; operators that have nothing
    to vary, such as `shared` without shared settings, are left out always.

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
        for lowered in (self.counts.repaired_bits, self.counts.repaired_rank):
            lowered.extend([0] * (self.problem.num_layers - len(lowered)))

    @cached_property
    def operators(self) -> tuple[MutationOperator, ...]:
        """The operators that have something to vary in the problem."""
        return tuple(operator for operator in self.mutations if operator.applies(self.problem))

    @property
    def crosses(self) -> bool:
        """Whether an operator wants mates; a searcher that has none of them to give need not draw any."""
        return any(isinstance(operator, CrossoverOperator) for operator in self.operators)

    @property
    def single_parent(self) -> tuple[MutationOperator, ...]:
        """The operators that need no mate."""
        return tuple(operator for operator in self.operators if not isinstance(operator, CrossoverOperator))

    def repaired(self, configuration: Configuration) -> Configuration | None:
        """Feasible configuration, or None when the repair policy rejects it."""
        self.counts.proposed += 1
        feasible = self.problem.feasible(configuration)
        self.counts.infeasible += not feasible
        try:
            repaired = self.repair.repair(self.problem, configuration)
        except RejectedConfigurationError:
            self.counts.rejected += 1
            return None
        if not feasible:
            self._count_steps_down(configuration, repaired)
        return repaired

    def filled(self, configuration: Configuration) -> Configuration:
        """A feasible configuration, its ranks those that the budget leaves where the repair policy `fills` it."""
        return self.repair.repair(self.problem, configuration) if self.repair.fills else configuration

    def _count_steps_down(self, before: Configuration, after: Configuration) -> None:
        space = self.problem.space
        down = np.maximum(space.indices(before) - space.indices(after), 0)
        for lowered, steps in ((self.counts.repaired_bits, down[:, 0]), (self.counts.repaired_rank, down[:, 1])):
            for layer in np.flatnonzero(steps).tolist():
                lowered[layer] += int(steps[layer])

    def vary(
        self, parent: Configuration, rng: np.random.Generator, edits: int = 1, *, mates: Sequence[Configuration] = ()
    ) -> tuple[Configuration, str] | None:
        """Feasible variant after `edits` operators in a row and their names; None when rejected.

        `mates` are the configurations that crossover may choose from. None as well when there is no mate other than
        the parent and every operator wants one.
        """
        varied = self._varied(parent, rng, edits, mates)
        return None if varied is None else varied[:2]

    def _varied(
        self, parent: Configuration, rng: np.random.Generator, edits: int, mates: Sequence[Configuration]
    ) -> tuple[Configuration, str, tuple[str, ...]] | None:
        """Variant, names of the operators, and the digests of all its parents."""
        others = [mate for mate in mates if mate != parent] if self.crosses else []
        operators = self.operators if others else self.single_parent
        if not operators:
            return None
        names, parents, child = list[str](), [parent.digest], parent
        for _ in range(edits):
            operator = operators[int(rng.integers(len(operators)))]
            if isinstance(operator, CrossoverOperator):
                mate = others[int(rng.integers(len(others)))]
                child = operator.cross(self.problem, child, mate, rng)
                parents.append(mate.digest)
            else:
                child = operator.mutate(self.problem, child, rng)
            names.append(getattr(operator, "component_name", type(operator).__name__))
        repaired = self.repaired(child)
        if repaired is None:
            return None
        return repaired, "+".join(dict.fromkeys(names)), tuple(dict.fromkeys(parents))

    def propose(
        self,
        parent: Configuration,
        rng: np.random.Generator,
        *,
        known: Collection[Configuration] = (),
        mates: Sequence[Configuration] = (),
        generation: int = 0,
        phase: str = "global",
    ) -> Candidate | None:
        """New feasible candidate bred from a parent; after a quarter of the tries, edits are chained to get away.

        `mates`: the configurations that crossover may choose from; a child of two names both as its parents.
        """
        for attempt in range(self.tries):
            varied = self._varied(parent, rng, 1 + 4 * attempt // self.tries, mates)
            if varied is None:
                continue
            child, origin, parents = varied
            if child not in known:
                return Candidate(child, origin, parents, generation, phase)
            self.counts.repeated += 1
        return None
