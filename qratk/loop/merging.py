"""The answer's adapter averaged with those of other trainings of the search, as long as that scores better.

Weights of several fine-tunings of one model averaged are often better than each (model soups, Wortsman et al. 2022,
arXiv:2203.05482), and a search has many of them. The greedy recipe of that paper: from the best on, one after another
is taken in, and kept where the validation score rises.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from qratk.core.evaluation import Evaluation, Member, mean_of
from qratk.core.plain import evaluation_of, plain
from qratk.core.work import counted
from qratk.loop.measuring import Measuring
from qratk.loop.settings import SearchSettings

ROUNDS: Final = 2
"""Times that every training gets its turn: one that did not help at first may do so beside those that came later."""


def merge(settings: SearchSettings, measuring: Measuring) -> None:
    """Have the state take the mean of trainings for the answer's, where that scores better; nothing is trained."""
    state, evaluator = measuring.state, measuring.evaluator
    alone = state.best
    if not settings.merge or alone is None or not evaluator.merges or not any(alone.configuration.ranks):
        return
    best = alone
    members: tuple[Member, ...] = (alone.member,)
    own = (alone.training, alone.replicate)
    others = [e for e in state.ingredients() if (e.training, e.replicate) != own][: settings.merge - 1]
    for _ in range(ROUNDS):
        waiting = [e for e in others if e.member not in members]
        before = len(members)
        for other in counted("averaging adapters", waiting, len(waiting)):
            tried = _measured(measuring, alone, (*members, other.member))
            if tried.ok and tried.score > best.score:
                best, members = tried, tried.merged
        if len(members) == before:
            break
    if best is not alone:
        state.take_merged(best)
    for other in others:
        if other.replicate and other.member not in members:  # of the search's own trainings `prune` knows
            evaluator.discard(other)


def _measured(measuring: Measuring, alone: Evaluation, members: Sequence[Member]) -> Evaluation:
    """The score of some trainings' mean, from the journal where it was measured before; a full memory is not kept."""
    name, journal = mean_of(members), measuring.journal
    measuring.state.averages.add(name)
    if (known := journal.decision(name)) is not None:
        return evaluation_of(known)
    with measuring.clock.timed("merging"):
        found = measuring.evaluator.merged(alone, members)
    if found.status != "lost":
        journal.decide(name, plain(found))
    return found
