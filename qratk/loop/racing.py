"""Uniform configurations, each with every combination of shared settings at the lowest rung: the best go up."""

from __future__ import annotations

from collections.abc import Sequence

from qratk.core.configuration import Configuration
from qratk.core.evaluation import Candidate, Evaluation, Request
from qratk.core.shared import Shared
from qratk.loop.measuring import Measuring
from qratk.loop.settings import Schedule, SearchSettings
from qratk.loop.state import Stage
from qratk.loop.stopping import room


def tuned(choices: Sequence[Configuration], combinations: Sequence[Shared]) -> list[list[Configuration]]:
    """Each choice with every combination of settings."""
    return [[choice.with_shared(shared) for shared in combinations] for choice in choices]


def race(
    groups: Sequence[Sequence[Configuration]],
    schedule: Schedule,
    settings: SearchSettings,
    measuring: Measuring,
    *,
    origin: str,
    stage: Stage,
) -> list[Evaluation]:
    """What the winners of the groups came to at the highest rung: successive halving within each group.

    A rung continues the best scores of the rung below; of equal ones those named first. Where a group has one member,
    it runs at every rung, whatever it came to. A cap on evaluations cuts off what is beyond it.
    """
    measured: list[Evaluation] = []
    below: dict[Configuration, Evaluation] = {}
    for steps, size in schedule:
        groups = [_leading(group, size, below) for group in groups]
        going_on = [configuration for group in groups for configuration in group]
        if stage.phase != "reference":
            going_on = going_on[: room(settings, measuring.state, steps)]
        requests = [Request(Candidate(c, origin, phase=stage.phase), steps) for c in going_on]
        measured = measuring.measure(requests, stage)
        below = {evaluation.configuration: evaluation for evaluation in measured}
    return measured


def _leading(
    group: Sequence[Configuration], size: int, below: dict[Configuration, Evaluation]
) -> Sequence[Configuration]:
    if size >= len(group):
        return group
    able = [c for c in group if c in below and below[c].ok]
    return sorted(able, key=lambda c: -below[c].score)[:size]
