"""Phase II: step after step of the local refiner, at the highest rung."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import final

import numpy as np

from qratk.core.evaluation import Request
from qratk.core.result import RefinementSummary
from qratk.core.utility import Utility
from qratk.loop.asking import Asking
from qratk.loop.measuring import Measuring
from qratk.loop.purse import Purse
from qratk.loop.settings import SearchSettings
from qratk.loop.state import SearchState, Stage
from qratk.loop.stopping import cap_reached
from qratk.mutations.proposer import Proposer


@final
@dataclass(frozen=True)
class Refining:
    """Has the refiner propose and its requests measured, until it is over."""

    settings: SearchSettings
    proposer: Proposer
    measuring: Measuring
    asking: Asking
    purse: Purse

    @property
    def _state(self) -> SearchState:
        return self.measuring.state

    def run(self, utility: Utility) -> str:
        """Step after step; says why that ended."""
        rng = np.random.default_rng([self.settings.seed, 2])
        refiner, state = self.settings.refiner, self._state
        refiner.begin(self.proposer, self.settings.ladder, utility, state.history)
        while not refiner.finished:
            if reason := cap_reached(self.settings, state):
                return reason
            began, before = time.monotonic(), state.best
            stage = Stage("local", len(state.refinements) + 1)
            requests = self.asking.asked(f"refinement/{stage.number}", refiner, rng, partial(self._ask_refiner, stage))
            if not requests:
                return refiner.stop_reason or "nothing new could be proposed"
            if self.purse.of_requests(requests) > self.purse.left_to_search:
                return self.purse.spent
            refiner.tell(self.measuring.measure(requests, stage))
            improved = state.best is not before
            seconds = time.monotonic() - began
            summary = RefinementSummary(stage.number, state.best, improved, refiner.diagnostics, seconds)
            state.refinements.append(summary)
            self.measuring.reporter.refinement(summary)
        return refiner.stop_reason

    def _ask_refiner(self, stage: Stage, rng: np.random.Generator) -> tuple[Request, ...]:
        requests = self.settings.refiner.ask(self._state.history, rng)
        return tuple(replace(request, candidate=stage.placed(request.candidate)) for request in requests)
