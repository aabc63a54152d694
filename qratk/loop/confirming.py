"""Confirmation: the contenders for the answer run again with fresh seeds, and the answer chosen by what that says.

The largest of many noisy scores is too large in the mean, the more so the more there are and the noisier they are:
the winner's curse. Runs with fresh seeds, of few candidates that were fixed before, are free of the first selection.
Each of them is a trained adapter, too: the answer's is the best of its configuration's, for trainings of one
configuration differ by more than many configurations do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import count
from typing import Final

from qratk.core.configuration import Configuration
from qratk.core.evaluation import Evaluation, Request
from qratk.core.result import Confirmed
from qratk.loop.measuring import Measuring
from qratk.loop.purse import Purse
from qratk.loop.settings import SearchSettings
from qratk.loop.state import Stage
from qratk.loop.statistics import mean_over_seeds

FEWEST_CONTENDERS: Final = 2
FEWEST_SEEDS: Final = 2
"""Of what is worth running again only because a budget is not spent yet."""


def confirm(settings: SearchSettings, measuring: Measuring, purse: Purse) -> None:
    """Run the contenders again at the highest rung, seed after seed, and have the state choose among them.

    They run as often as was asked for, and as often as a budget of full runs pays for; where that alone is what asks,
    two contenders and two seeds are the fewest that say anything.
    """
    state = measuring.state
    contenders, asked = state.contenders(), 0 if settings.confirm is None else settings.confirm.seeds
    if purse.limited and not asked:
        contenders = state.contenders(int(purse.left // (FEWEST_SEEDS * state.effort.highest)))
        if len(contenders) < min(FEWEST_CONTENDERS, len(state.fitting(state.effort.highest))):
            return
    candidates = {r.evaluation.configuration: r.candidate for r in state.records if r.searched}
    measured: dict[Configuration, list[Evaluation]] = {e.configuration: [] for e in contenders}
    for seed in count(1):
        stage = Stage("confirmation", seed)
        own = [stage.placed(candidates[e.configuration]) for e in contenders]
        requests: Sequence[Request] = [Request(candidate, state.effort.highest, seed) for candidate in own]
        if seed > asked:
            requests = purse.affordable(requests, purse.left) if purse.limited else ()
        if not requests:
            break
        for replicate in measuring.measure(requests, stage):
            measured[replicate.configuration].append(replicate)
    _conclude([(e, measured[e.configuration]) for e in contenders if measured[e.configuration]], measuring)


def _conclude(measured: Sequence[tuple[Evaluation, Sequence[Evaluation]]], measuring: Measuring) -> None:
    """Have the state choose; delete the checkpoints, which nothing will continue or report, but for the answer's."""
    measuring.state.confirm([_confirmed(selected, replicates) for selected, replicates in measured])
    wanted = (measuring.state.best, *measuring.state.ingredients())
    for _, replicates in measured:
        for replicate in replicates:
            if replicate.checkpoint is not None and replicate not in wanted:
                measuring.evaluator.discard(replicate)
    if measured and not any(confirmation.scores for confirmation in measuring.state.confirmations):
        measuring.reporter.message("No contender could be run again with fresh seeds: the answer is not confirmed.")


def _confirmed(selected: Evaluation, replicates: Sequence[Evaluation]) -> Confirmed:
    if any(e.status == "failed" for e in replicates):
        return Confirmed(selected, tuple(replicates), -math.inf, math.nan, math.nan)
    mean, low, high = mean_over_seeds([e.score for e in replicates if e.ok])
    return Confirmed(selected, tuple(replicates), mean, low, high)
