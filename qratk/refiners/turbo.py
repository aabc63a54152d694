"""One trust region with counters of successes and failures: TuRBO-1 on atomic edits (Eriksson et al. 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from qratk.core.configuration import Configuration, unique
from qratk.core.errors import ConfigurationError
from qratk.core.evaluation import Evaluation, FidelityLadder, History, Request
from qratk.core.utility import Utility
from qratk.mutations.proposer import Proposer
from qratk.refiners._model_guided import ModelGuided
from qratk.refiners._pool import pool
from qratk.refiners._regions import RadiusRule, spread
from qratk.refiners.base import refiners
from qratk.searchers.sampling import sample_feasible

DRAWS = 20


@refiners.register("turbo")
class Turbo(ModelGuided):
    """One region around the best since its start: it doubles after successes in a row, and halves after failures.

    After failures at `min_radius`, the region starts again: at the best measured configuration that is
    `restart_distance` edits from all earlier centres or, when there is none, at a random configuration, which is
    measured first. A success is an improvement on the best since the start of the region, not on the best of all.

    Differs from the paper (Eriksson et al. 2019, section 2 and supplement D): the region is a ball of atomic edits, its
    candidate is the pool member of largest expected improvement instead of a Thompson sample, and the process keeps the
    measurements of earlier regions, which are too few to throw away. While a ball holds nothing new, its radius grows.

    Args:
        radius, min_radius, max_radius: first, least and largest radius in atomic edits.
        success_tolerance, failure_tolerance: successes and failures in a row that double and halve the radius.
        restart_distance: least number of atomic edits of a new centre from all earlier ones.
        max_evaluations: cap on evaluations at the highest rung.
        pool_size: configurations scored at most; smaller balls are enumerated.
        ard: one length-scale a dimension instead of a single one.
    """

    origin: ClassVar[str] = "turbo"

    def __init__(
        self,
        radius: int = 4,
        min_radius: int = 1,
        max_radius: int = 16,
        success_tolerance: int = 3,
        failure_tolerance: int = 3,
        restart_distance: int = 4,
        max_evaluations: int = 15,
        pool_size: int = 2000,
        ard: bool = False,
    ) -> None:
        counts = {
            "success_tolerance": success_tolerance, "failure_tolerance": failure_tolerance,
            "restart_distance": restart_distance, "pool_size": pool_size,
        }  # fmt: skip
        for name, value in counts.items():
            if value < 1:
                raise ConfigurationError(f"turbo: {name} must be at least 1, got {value}")
        super().__init__(max_evaluations, ard=ard, mix=None)
        self.rule = RadiusRule(radius, min_radius, max_radius)
        self.success_tolerance = success_tolerance
        self.failure_tolerance = failure_tolerance
        self.restart_distance = restart_distance
        self.pool_size = pool_size

    def begin(self, proposer: Proposer, ladder: FidelityLadder, utility: Utility, history: History) -> None:
        """Start at the best measured configuration."""
        super().begin(proposer, ladder, utility, history)
        self._centres: tuple[Configuration, ...] = ()  # all that the region was ever centred on, the present one last
        self._starting = True
        self._radius, self._successes, self._failures, self._restarts = self.rule.start, 0, 0, -1

    def ask(self, history: History, rng: np.random.Generator) -> tuple[Request, ...]:
        """The pool member of largest expected improvement, or a random configuration to start at."""
        if self.finished:
            return ()
        while not self._starting or self._start(history):
            found = self._choice(history, rng)
            if found is not None:
                return self._request(found, self._centres[-1])
            self._starting = True
        drawn = self._far_away(history, rng)
        if drawn is not None:
            return self._request(drawn)
        return self._finish("nothing new is left in any trust region")

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Move the centre to what improved, count, and change the radius."""
        for evaluation in evaluations:
            if not self._starting:
                self._judge(evaluation)
            elif evaluation.ok:
                self._centre_on(evaluation.configuration, self._utility.of(evaluation))
        super().tell(evaluations)

    def state(self) -> dict[str, Any]:
        """Centres, radius and counters."""
        return {
            **super().state(),
            "centres": [str(centre) for centre in self._centres],
            "starting": self._starting,
            "radius": self._radius,
            "counters": [self._successes, self._failures, self._restarts, self._evaluations],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        super().restore(state)
        self._centres = tuple(Configuration.from_text(text) for text in state["centres"])
        self._starting = bool(state["starting"])
        self._radius = int(state["radius"])
        self._successes, self._failures, self._restarts, self._evaluations = state["counters"]

    # -- the region

    def _centre_on(self, configuration: Configuration, utility: float) -> None:
        """Start the region at a measured configuration."""
        self._centres = unique((*(c for c in self._centres if c != configuration), configuration))
        self._starting = False
        self._best = utility
        self._radius, self._successes, self._failures = self.rule.start, 0, 0
        self._restarts += 1

    def _start(self, history: History) -> bool:
        """Start at the best measured configuration away from all centres; whether there is one."""
        found = spread(
            self._ranked(history),
            self._proposer.problem.space,
            count=1,
            distance=self.restart_distance,
            taken=self._centres,
        )
        for configuration in found:
            self._centre_on(configuration, self._utility_of(history, configuration))
        return bool(found)

    def _far_away(self, history: History, rng: np.random.Generator) -> Configuration | None:
        """Of some random configurations the one farthest from all centres."""
        problem, known = self._proposer.problem, {e.configuration for e in history}
        drawn = unique(c for _ in range(DRAWS) if (c := sample_feasible(problem, rng, known=known)) is not None)
        space, centres = problem.space, self._centres
        self._diagnostics = {"best_utility": self._best, "restarts": float(self._restarts + 1)}
        return max(drawn, key=lambda c: min(space.atomic_distance(c, centre) for centre in centres), default=None)

    def _judge(self, evaluation: Evaluation) -> None:
        """Successes and failures in a row; the radius follows, and collapses to a new start."""
        if self._utility.of(evaluation) > self._best:
            self._best = self._utility.of(evaluation)
            self._centres = (*self._centres, evaluation.configuration)
            self._successes, self._failures = self._successes + 1, 0
        else:
            self._successes, self._failures = 0, self._failures + 1
        if self._successes >= self.success_tolerance:
            self._radius, self._successes = self.rule.grown(self._radius), 0
        elif self._failures >= self.failure_tolerance:
            self._starting = self._radius == self.rule.lowest
            self._radius, self._failures = self.rule.shrunk(self._radius), 0

    # -- the choice

    def _choice(self, history: History, rng: np.random.Generator) -> Configuration | None:
        """Pool member of largest expected improvement on the region's best; None when nothing new is left."""
        excluded, centre = self._spent(history), self._centres[-1]
        farthest = sum(len(self._proposer.problem.space.ladder(knob)) - 1 for knob in ("bits", "rank"))
        farthest *= self._proposer.problem.num_layers
        members: tuple[Configuration, ...] = ()
        while not members:
            members = pool(self._proposer, centre, self._radius, size=self.pool_size, excluded=excluded, rng=rng)
            if not members and self._radius >= min(self.rule.highest, farthest):
                return None
            self._radius += not members
        order, _ = self._rank(history, dict.fromkeys(members, 0), rng)
        self._diagnostics |= {"radius": float(self._radius), "restarts": float(self._restarts)}
        return members[order[0]]

    def _request(self, configuration: Configuration, *parents: Configuration) -> tuple[Request, ...]:
        return (Request(self._candidate(configuration, *parents), self._ladder.highest),)
