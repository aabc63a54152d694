"""Asking a strategy for requests, once: what it said is in the journal, with the states to go on from there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from qratk.core.evaluation import Request
from qratk.core.plain import request_data, request_of
from qratk.loop.state import Clock
from qratk.mutations.proposer import Proposer
from qratk.refiners.base import LocalRefiner
from qratk.run.journal import Journal
from qratk.searchers.base import GlobalSearcher


@dataclass(frozen=True)
class Asking:
    """Asks strategies, of which each request is decided once."""

    journal: Journal
    proposer: Proposer
    clock: Clock

    def asked(
        self,
        key: str,
        strategy: GlobalSearcher | LocalRefiner,
        rng: np.random.Generator,
        ask: Callable[[np.random.Generator], Sequence[Request]],
    ) -> tuple[Request, ...]:
        """What `ask` returns; from the journal if it is there, with strategy and generator set to go on from there."""
        saved = self.journal.decision(key)
        if saved is None:
            with self.clock.timed("strategy"):
                requests = tuple(ask(rng))
            state = {
                "strategy": strategy.state(),
                "rng": rng.bit_generator.state,
                "proposals": self.proposer.counts.state(),
            }
            self.journal.decide(key, {"requests": [request_data(r) for r in requests], **state})
            return requests
        strategy.restore(saved["strategy"])
        rng.bit_generator.state = saved["rng"]
        self.proposer.counts.restore(saved["proposals"])
        return tuple(request_of(data) for data in saved["requests"])
