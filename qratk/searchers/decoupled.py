"""Bits first, then ranks: what a search of both knobs together has to beat."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError, InfeasibleBudgetError
from qratk.core.evaluation import Candidate, FidelityLadder
from qratk.core.problem import Problem
from qratk.mutations.proposer import Proposer
from qratk.programs.integer import bits_then_ranks
from qratk.searchers.base import searchers
from qratk.searchers.generations import SingleGenerationSearcher


@searchers.register("decoupled")
class Decoupled(SingleGenerationSearcher):
    """Bits by an integer program, then ranks by another within what is left, for every rank floor; one generation.

    The bits minimise sum_l I_q(l) 4^-(b_l - b_0) within the budget while all ranks stay at the floor: the squared error
    of rounding falls fourfold a bit. The ranks then maximise sum_l I_r(l) log2(1 + r_l), a gain with diminishing
    returns. Both importances are taken raw, since ratios between layers matter here. Estimators that measure every
    bit-width, or rank, take the place of these formulas with what they measured. The paper's criticism of such
    sequential pipelines (section 1) is what this searcher lets one measure.

    Args:
        rank_floor: lowest rank of any layer, one of the ladder, or its `lowest`; each that fits in turn when None.
        offspring: how many candidates are proposed at most, those with the largest floors first.
        raise_ranks: whether there is the second program; without it all ranks stay at the floor.
    """

    def __init__(
        self, rank_floor: int | Literal["lowest"] | None = None, offspring: int = 8, raise_ranks: bool = True
    ) -> None:
        super().__init__()
        if offspring < 1:
            raise ConfigurationError(f"offspring must be at least 1, got {offspring}")
        self.rank_floor: int | Literal["lowest"] | None = rank_floor
        self.raise_ranks = raise_ranks
        self.offspring = offspring

    def begin(self, proposer: Proposer, ladder: FidelityLadder) -> None:
        """Forget everything; raises `ConfigurationError` when the rank floor is off the ladder."""
        ranks = proposer.problem.space.ranks
        if self.rank_floor not in (None, "lowest", *ranks):
            raise ConfigurationError(
                f"decoupled: rank_floor must be one of {ranks}, or lowest, got {self.rank_floor!r}"
            )
        super().begin(proposer, ladder)

    @property
    def generation_size(self) -> int:
        """`offspring`."""
        return self.offspring

    def candidates(self, problem: Problem, known: Collection[Configuration]) -> tuple[Candidate, ...]:
        ranks, wanted = problem.space.ranks, self.rank_floor
        floors = ranks if wanted is None else (ranks[0] if wanted == "lowest" else wanted,)
        chosen: dict[Configuration, Candidate] = {}
        for floor in sorted(floors, reverse=True):
            try:
                found = bits_then_ranks(problem, floor, shared=(), raise_ranks=self.raise_ranks)
            except InfeasibleBudgetError:
                continue
            if found not in known and len(chosen) < self.offspring:
                chosen.setdefault(found, Candidate(found, f"decoupled:{floor}"))
        return tuple(chosen.values())
