"""What a search has trained, counted in optimiser steps: whatever goes on from a rung, or is shared, counts once."""

from __future__ import annotations

from collections.abc import Iterable

from qratk.core.evaluation import Evaluation

Training = tuple[str, int]
"""Digest that names a training (`Evaluation.training`), and its replicate."""


class Effort:
    """Optimiser steps of all trainings so far; scoring is apart.

    Args:
        highest: T_S, the steps of a full run.
        untrained: rung that trains nothing, whatever number it has; None where each does.
        shared_runs: full runs that are trained for all candidates together.
    """

    def __init__(self, highest: int, untrained: int | None = None, shared_runs: int = 0) -> None:
        self.highest, self.untrained = highest, untrained
        self.steps = shared_runs * highest
        self._trained: dict[Training, int] = {}

    @property
    def full_runs(self) -> float:
        """The steps in units of T_S."""
        return self.steps / self.highest

    def add(self, evaluation: Evaluation) -> None:
        """Count what an evaluation was trained beyond what its training had before; failed ones too."""
        training = (evaluation.training, evaluation.replicate)
        self.steps += self.lacking([training], evaluation.steps)
        if evaluation.steps != self.untrained:
            self._trained[training] = max(evaluation.steps, self._trained.get(training, 0))

    def lacking(self, trainings: Iterable[Training], steps: int) -> int:
        """Steps that bringing these to so many would take."""
        if steps == self.untrained:
            return 0
        return sum(max(0, steps - self._trained.get(training, 0)) for training in set(trainings))
