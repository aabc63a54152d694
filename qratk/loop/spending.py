"""What is left of a budget of full runs, spent on further settings of the best layers.

Recipes that are compared at equal effort end at different points: one without a search has measured what it proposes
and goes on to tune that. Half of what is left goes to settings here, the rest to fresh seeds of the best few.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qratk.core.configuration import Configuration, LayerChoice
from qratk.core.evaluation import Candidate, Request
from qratk.core.shared import REPLICATE
from qratk.loop.confirming import FEWEST_CONTENDERS, FEWEST_SEEDS
from qratk.loop.measuring import Measuring
from qratk.loop.purse import Purse
from qratk.loop.settings import LAYOUTS, SearchSettings
from qratk.loop.state import Stage
from qratk.loop.stopping import room


@dataclass(frozen=True)
class Spending:
    """Takes the next best settings of the best layers up the ladder, round after round.

    Which layers, is settled before the first round.
    """

    settings: SearchSettings
    measuring: Measuring
    purse: Purse

    def run(self) -> None:
        """Until half of what is left is spent, or all where half of it is too little for fresh seeds."""
        if not self.settings.shared_ladders:
            return
        highest, half, number = self.settings.ladder.highest, self.purse.left_to_search / 2, 0
        seeded = self.settings.seeds > 1  # then a further seed is a setting, too
        kept = 0 if seeded or half < FEWEST_CONTENDERS * FEWEST_SEEDS * highest else half
        layouts = self._layouts()
        while chosen := self._next(layouts):
            chosen = chosen[: room(self.settings, self.measuring.state, highest)]
            wanted = [Request(candidate, highest) for candidate in chosen]
            chosen = [r.candidate for r in self.purse.affordable(wanted, self.purse.left_to_search - kept)]
            if not chosen:
                return
            number += 1
            stage = Stage("tuning", number)
            for steps, _ in self.settings.settings_race:
                going = [c for c in chosen if self._goes_on(c.configuration, steps)]
                self.measuring.measure([Request(stage.placed(c), steps) for c in going], stage)

    def _layouts(self) -> list[Candidate]:
        """The best layers: by score at T_S, and where fewer got there by that of the rungs below."""
        state, leading = self.measuring.state, list[Configuration]()
        for steps in reversed(self.settings.ladder.steps):
            leading += [e.configuration for e in sorted(state.fitting(steps), key=lambda e: -e.score)]
        origins = {r.evaluation.configuration: r.candidate for r in state.records if r.searched}
        best: dict[tuple[LayerChoice, ...], Configuration] = {}
        for configuration in leading:
            best.setdefault(configuration.layers, configuration)
        return [origins[configuration] for configuration in list(best.values())[:LAYOUTS]]

    def _goes_on(self, configuration: Configuration, steps: int) -> bool:
        return self._reached(configuration) < steps and not self._failed(configuration)

    def _next(self, layouts: Sequence[Candidate]) -> list[Candidate]:
        """Of each layout the settings that come next: those that got farthest, and scored best there.

        Where seeds are searched, every seed of the layout's best settings comes before the next settings.
        """
        highest, chosen = self.settings.ladder.highest, []
        for origin in layouts:
            every = [origin.configuration.with_shared(s) for s in self.measuring.plan.problem.space.all_shared]
            untried = [configuration for configuration in every if self._goes_on(configuration, highest)]
            if untried:
                best = max(untried, key=lambda c: (-self._steps_off(c, origin.configuration), *self._standing(c)))
                chosen.append(replace(origin, configuration=best))
        return chosen

    def _steps_off(self, configuration: Configuration, origin: Configuration) -> int:
        """Rungs between their settings, another seed being none; 0 where seeds are not searched."""
        if self.settings.seeds == 1:
            return 0
        ladders = self.measuring.plan.problem.space.shared
        own, other = configuration.settings, origin.settings
        places = ((ladder, ladder.index(own[ladder.name]), ladder.index(other[ladder.name])) for ladder in ladders)
        return sum(ladder.distance(a, b) for ladder, a, b in places if ladder.name != REPLICATE)

    def _standing(self, configuration: Configuration) -> tuple[int, float]:
        reached = self._reached(configuration)
        evaluation = self.measuring.state.history.get(configuration, reached)
        return reached, 0.0 if evaluation is None else evaluation.score

    def _reached(self, configuration: Configuration) -> int:
        """The highest rung at which it was measured; 0 for none."""
        steps = (s for s, _ in self.settings.settings_race[::-1])
        return next((s for s in steps if self.measuring.state.history.get(configuration, s) is not None), 0)

    def _failed(self, configuration: Configuration) -> bool:
        evaluation = self.measuring.state.history.get(configuration, self._reached(configuration))
        return evaluation is not None and not evaluation.ok
