"""Shared settings tuned for given layers: every combination at the lowest rung, of which the best go up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qratk.core.configuration import Configuration
from qratk.core.evaluation import Candidate, Evaluation, Request
from qratk.core.shared import Shared
from qratk.loop.measuring import Measuring
from qratk.loop.settings import Schedule, SearchSettings
from qratk.loop.state import Stage
from qratk.loop.stopping import room

Group = Sequence[Candidate]
"""The same layers at different settings, of which one is wanted."""


def group(candidate: Candidate, combinations: Sequence[Shared]) -> Group:
    """The candidate with every combination of settings; one that has settings stands alone."""
    if candidate.configuration.shared:
        return (candidate,)
    return [replace(candidate, configuration=candidate.configuration.with_shared(s)) for s in combinations]


def race(
    groups: Sequence[Group], schedule: Schedule, settings: SearchSettings, measuring: Measuring, stage: Stage
) -> list[list[Evaluation]]:
    """All that was measured of the groups, rung by rung: successive halving within each group.

    A rung continues the best scores of the rung below; of equal ones those named first. Where a group has one member,
    it runs at every rung, whatever it came to. A cap on evaluations cuts off what is beyond it.
    """
    measured: list[list[Evaluation]] = []
    for steps, size in schedule:
        groups = [leading(members, size, measured[-1] if measured else ()) for members in groups]
        going_on = [candidate for members in groups for candidate in members]
        if stage.phase != "reference":
            going_on = going_on[: room(settings, measuring.state, steps)]
        measured.append(measuring.measure([Request(candidate, steps) for candidate in going_on], stage))
    return measured


def spread_race(groups: Sequence[Group], settings: SearchSettings, measuring: Measuring, stage: Stage) -> None:
    """A race of one group of settings after another, the largest configuration first, that tunes them but once.

    The first is measured with every value of each setting, and its best two go up all rungs: short runs are a poor
    judge of rates. The others have the better of the two settings, each with another seed, and the best of them go up.
    """
    problem = measuring.plan.problem
    space, stands = problem.space, [members[0] for members in groups]
    first, *others = sorted(stands, key=lambda c: (-problem.bytes(c.configuration), c.configuration))
    tried = group(replace(first, configuration=first.configuration.with_shared(())), space.spread_shared)
    own, rest = settings.spread_races(len(groups))
    *_, found = race([tried], own, settings, measuring, stage)
    able = [e for e in found if e.ok]
    best = max(able, key=lambda e: e.score).configuration.shared if able else space.middle
    placed = [
        replace(candidate, configuration=candidate.configuration.with_shared(space.reseeded(best, number)))
        for number, candidate in enumerate(others, start=1)
    ]
    if placed:
        race([placed], rest, settings, measuring, stage)


def leading(members: Group, size: int, below: Sequence[Evaluation]) -> Group:
    """The best `size` of a group by what was measured of it; the group itself where it is no larger."""
    if size >= len(members):
        return members
    scores: dict[Configuration, float] = {e.configuration: e.score for e in below if e.ok}
    able = [candidate for candidate in members if candidate.configuration in scores]
    return sorted(able, key=lambda candidate: -scores[candidate.configuration])[:size]
