"""Bits first, then ranks: what a search of both knobs together has to beat."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError, InfeasibleBudgetError
from qratk.core.evaluation import Candidate, Evaluation, FidelityLadder, History
from qratk.core.problem import Problem
from qratk.mutations._proposer import Proposer
from qratk.searchers._integer_program import bits_then_ranks
from qratk.searchers.base import GlobalSearcher, searchers


@searchers.register("decoupled")
class Decoupled(GlobalSearcher):
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
        if offspring < 1:
            raise ConfigurationError(f"offspring must be at least 1, got {offspring}")
        self.rank_floor = rank_floor
        self.offspring = offspring
        self._proposer: Proposer | None = None
        self._asked = False

    def begin(self, proposer: Proposer, ladder: FidelityLadder) -> None:
        """Forget everything; raises `ConfigurationError` when the rank floor is off the ladder."""
        ranks = proposer.problem.space.ranks
        if self.rank_floor is not None and self.rank_floor not in ranks:
            raise ConfigurationError(f"decoupled: rank_floor must be one of {ranks}, got {self.rank_floor}")
        self._proposer = proposer
        self._asked = False

    def ask(self, history: History, rng: np.random.Generator) -> tuple[Candidate, ...]:
        """All that this searcher ever proposes, less what was measured before; nothing the second time."""
        assert self._proposer is not None, "begin comes before ask"
        if self._asked:
            return ()
        self._asked = True
        problem = self._proposer.problem
        floors = problem.space.ranks if self.rank_floor is None else (self.rank_floor,)
        return self._candidates(problem, floors, {evaluation.configuration for evaluation in history})

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Results change nothing."""

    def planned_evaluations(self, ladder: FidelityLadder, high: int, generations: int) -> dict[int, int]:
        """Those of one generation."""
        return super().planned_evaluations(ladder, high, min(generations, 1))

    @property
    def finished(self) -> bool:
        """Whether the one generation was asked for."""
        return self._asked

    @property
    def generation_size(self) -> int:
        """`offspring`."""
        return self.offspring

    def state(self) -> dict[str, Any]:
        """Whether the one generation was asked for."""
        return {"asked": self._asked}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self._asked = bool(state["asked"])

    def _candidates(
        self, problem: Problem, floors: Sequence[int], known: Collection[Configuration]
    ) -> tuple[Candidate, ...]:
        chosen: dict[Configuration, Candidate] = {}
        for floor in sorted(floors, reverse=True):
            try:
                found = bits_then_ranks(problem, floor)
            except InfeasibleBudgetError:
                continue
            if found not in known and len(chosen) < self.offspring:
                chosen.setdefault(found, Candidate(found, f"decoupled:{floor}"))
        return tuple(chosen.values())
