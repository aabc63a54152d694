"""Confirmation: the contenders for the answer run again with fresh seeds, and the answer chosen by what that says.

The largest of many noisy scores is too large in the mean, the more so the more there are and the noisier they are:
the winner's curse. Runs with fresh seeds, of few candidates that were fixed before, are free of the first selection.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from qratk.core.evaluation import Evaluation, Request
from qratk.core.result import Confirmed
from qratk.loop.measuring import Measuring
from qratk.loop.state import Stage
from qratk.loop.statistics import mean_over_seeds


def confirm(seeds: int, measuring: Measuring) -> None:
    """Run the contenders so often at the highest rung, seed after seed, and have the state choose among them."""
    state, highest = measuring.state, measuring.plan.ladder.highest
    candidates = {r.evaluation.configuration: r.candidate for r in state.records if r.searched}
    contenders = state.contenders()
    measured: list[list[Evaluation]] = [[] for _ in contenders]
    for seed in range(1, seeds + 1):
        stage = Stage("confirmation", seed)
        requests = [Request(stage.placed(candidates[e.configuration]), highest, seed) for e in contenders]
        for own, replicate in zip(measured, measuring.measure(requests, stage), strict=True):
            own.append(replicate)
    state.confirm([_confirmed(e, own) for e, own in zip(contenders, measured, strict=True)])
    for replicates in measured:
        for replicate in replicates:
            if replicate.checkpoint is not None:
                measuring.evaluator.discard(replicate)
    if not any(confirmation.scores for confirmation in state.confirmations):
        measuring.reporter.message("No contender could be run again with fresh seeds: the answer is not confirmed.")


def _confirmed(selected: Evaluation, replicates: Sequence[Evaluation]) -> Confirmed:
    if any(e.status == "failed" for e in replicates):
        return Confirmed(selected, tuple(replicates), -math.inf, math.nan, math.nan)
    mean, low, high = mean_over_seeds([e.score for e in replicates if e.ok])
    return Confirmed(selected, tuple(replicates), mean, low, high)
