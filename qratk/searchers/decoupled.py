"""Bits first, then ranks: what a search of both knobs together has to beat."""

from __future__ import annotations

from collections.abc import Collection

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
    returns. Both importances are taken raw, since ratios between layers matter here. The paper's criticism of such
    sequential pipelines (section 1) is what this searcher lets one measure.

    Args:
        rank_floor: lowest rank of any layer, one of the ladder; each that fits in turn when None.
        offspring: how many candidates are proposed at most, those with the largest floors first.
    """

    def __init__(self, rank_floor: int | None = None, offspring: int = 8) -> None:
        super().__init__()
        if offspring < 1:
            raise ConfigurationError(f"offspring must be at least 1, got {offspring}")
        self.rank_floor = rank_floor
        self.offspring = offspring

    def begin(self, proposer: Proposer, ladder: FidelityLadder) -> None:
        """Forget everything; raises `ConfigurationError` when the rank floor is off the ladder."""
        ranks = proposer.problem.space.ranks
        if self.rank_floor is not None and self.rank_floor not in ranks:
            raise ConfigurationError(f"decoupled: rank_floor must be one of {ranks}, got {self.rank_floor}")
        super().begin(proposer, ladder)

    @property
    def generation_size(self) -> int:
        """`offspring`."""
        return self.offspring

    def candidates(self, problem: Problem, known: Collection[Configuration]) -> tuple[Candidate, ...]:
        floors = problem.space.ranks if self.rank_floor is None else (self.rank_floor,)
        chosen: dict[Configuration, Candidate] = {}
        for floor in sorted(floors, reverse=True):
            try:
                found = bits_then_ranks(problem, floor, shared=())
            except InfeasibleBudgetError:
                continue
            if found not in known and len(chosen) < self.offspring:
                chosen.setdefault(found, Candidate(found, f"decoupled:{floor}"))
        return tuple(chosen.values())
