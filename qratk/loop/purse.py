"""What a search may still train, where it has a budget of full runs, and what its next steps would take of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from qratk.core.configuration import Configuration
from qratk.core.effort import Training
from qratk.core.evaluation import Request
from qratk.loop.measuring import Measuring
from qratk.loop.racing import Group
from qratk.loop.settings import Schedule, SearchSettings


@dataclass(frozen=True)
class Purse:
    """Counts in optimiser steps. Without a budget everything can be had."""

    settings: SearchSettings
    measuring: Measuring

    @property
    def limited(self) -> bool:
        """Whether there is a budget."""
        return self.settings.full_runs is not None

    @property
    def left(self) -> float:
        """What may still be trained, fresh seeds included."""
        if self.settings.full_runs is None:
            return math.inf
        effort = self.measuring.state.effort
        return self.settings.full_runs * effort.highest - effort.steps

    @property
    def left_to_search(self) -> float:
        """The same without what the confirmation that was asked for will take."""
        return self.left - self.settings.planned_replicates * self.measuring.state.effort.highest

    @property
    def spent(self) -> str:
        """That the budget ends something, in words."""
        return f"the budget of {self.settings.full_runs:g} full runs"

    def trainings(self, configurations: Iterable[Configuration]) -> set[Training]:
        """What is trained for configurations, with the seeds that were given."""
        return {(self.measuring.evaluator.training(configuration), 0) for configuration in configurations}

    def of_requests(self, requests: Sequence[Request]) -> int:
        """What requests take; each continues from what is trained by now."""
        asked: dict[int, set[Training]] = {}
        for request in requests:
            training = self.measuring.evaluator.training(request.configuration)
            asked.setdefault(request.steps, set()).add((training, request.replicate))
        effort = self.measuring.state.effort
        return sum(effort.lacking(trainings, steps) for steps, trainings in asked.items())

    def affordable(self, requests: Sequence[Request], left: float) -> Sequence[Request]:
        """The first of the requests, as many as so much pays for."""
        return next((requests[:n] for n in range(len(requests), 0, -1) if self.of_requests(requests[:n]) <= left), ())

    def of_race(self, groups: Sequence[Group], schedule: Schedule) -> int:
        """The most that a race of the groups takes; of those that share a training one is counted."""
        (first, _), *_ = schedule
        trainings = self.trainings(candidate.configuration for members in groups for candidate in members)
        effort = self.measuring.state.effort
        going = tuple((steps, sum(min(size, len(members)) for members in groups)) for steps, size in schedule)
        return effort.lacking(trainings, first) + self.of_rungs(going, most=len(trainings))

    def of_rungs(self, schedule: Schedule, *, most: float = math.inf) -> int:
        """What the rungs above the first take, so many trainings at each, at most `most`."""
        total, untrained = 0, self.measuring.state.effort.untrained
        for (below, _), (steps, size) in pairwise(schedule):
            total += int(min(size, most)) * (steps - (0 if below == untrained else below))
        return total

    def of_tuning(self) -> int:
        """The most that one configuration of layers takes with all combinations of shared settings, up to T_S."""
        (first, size), *_ = schedule = self.settings.settings_race
        return size * first + self.of_rungs(schedule)
