"""Who survives: rung-major, constrained, by non-dominated sorting and crowding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qratk.core.configuration import Configuration
from qratk.core.evaluation import Evaluation
from qratk.core.problem import Problem


@dataclass(frozen=True)
class Member:
    """A member of the population with the score at the highest rung that it reached; None when it failed there.

    `rank` counts fronts over all rungs, 0 is best; `crowding` is larger in emptier regions of a front.
    """

    configuration: Configuration
    steps: int
    score: float | None
    bytes: int
    violation: float
    rank: int = 0
    crowding: float = 0.0

    @classmethod
    def of(cls, evaluation: Evaluation, problem: Problem) -> Member:
        """Member for an evaluation, not yet ranked."""
        configuration = evaluation.configuration
        return cls(
            configuration,
            evaluation.steps,
            evaluation.score if evaluation.ok else None,
            problem.bytes(configuration),
            problem.violation(configuration),
        )

    def to_plain(self) -> dict[str, Any]:
        """What JSON can hold; an infinite crowding distance is written as None."""
        return {
            "configuration": str(self.configuration),
            "steps": self.steps,
            "score": self.score,
            "rank": self.rank,
            "crowding": None if math.isinf(self.crowding) else self.crowding,
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any], problem: Problem) -> Member:
        """Member written by `to_plain`; its bytes are computed anew."""
        configuration = Configuration.from_text(plain["configuration"])
        crowding = math.inf if plain["crowding"] is None else float(plain["crowding"])
        bytes_, violation = problem.bytes(configuration), problem.violation(configuration)
        return cls(configuration, plain["steps"], plain["score"], bytes_, violation, plain["rank"], crowding)


def highest_rungs(members: Sequence[Member]) -> tuple[Member, ...]:
    """One member a configuration: that of its highest rung. A failure counts at its rung, as what it is."""
    best: dict[Configuration, Member] = {}
    for member in members:
        old = best.get(member.configuration)
        if old is None or member.steps > old.steps:
            best[member.configuration] = member
    return tuple(best.values())


def survivors(members: Sequence[Member], size: int) -> tuple[Member, ...]:
    """The best `size` members, ranked, best first.

    What reached a higher rung outranks what did not: scores at different rungs do not compare. Within a rung,
    non-dominated sorting on (score, bytes), then crowding. After all these come configurations over the budget, by
    violation, and last the failed ones.
    """
    ranked: list[Member] = []
    for rank, front in enumerate(_fronts(highest_rungs(members))):
        ordered = sorted(_crowded(front), key=lambda member: -member.crowding)  # stable: earlier ones win ties
        ranked += [replace(member, rank=rank) for member in ordered]
        if len(ranked) >= size:
            break
    return tuple(ranked[:size])


def _fronts(members: Sequence[Member]) -> list[list[Member]]:
    fitting = [m for m in members if m.score is not None and m.violation == 0]
    over = [m for m in members if m.score is not None and m.violation > 0]
    failed = [m for m in members if m.score is None]
    fronts: list[list[Member]] = []
    for steps in sorted({m.steps for m in fitting}, reverse=True):
        fronts += non_dominated_fronts([m for m in fitting if m.steps == steps])
    for violation in sorted({m.violation for m in over}):
        fronts.append([m for m in over if m.violation == violation])
    return [*fronts, failed] if failed else fronts


def non_dominated_fronts(members: Sequence[Member]) -> list[list[Member]]:
    """Members of one rung by front: larger score, fewer bytes."""
    from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

    fronts = NonDominatedSorting().do(_objectives(members))
    return [[members[int(i)] for i in sorted(front)] for front in fronts]


def _crowded(front: Sequence[Member]) -> list[Member]:
    """The front with crowding distances; all 0 among the failed, which have no objectives."""
    from pymoo.operators.survival.rank_and_crowding.metrics import get_crowding_function

    if any(member.score is None for member in front):
        return list(front)
    distances = get_crowding_function("cd").do(_objectives(front), n_remove=0)
    return [replace(m, crowding=float(d)) for m, d in zip(front, distances, strict=True)]


def _objectives(members: Sequence[Member]) -> np.ndarray:
    """Both minimised, (n, 2): the only place where the score's sign is flipped."""
    return np.array([[-float(m.score or 0.0), float(m.bytes)] for m in members])
