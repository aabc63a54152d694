"""Evaluation in microseconds on a known response surface: to study strategies, not models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import final

from qratk.core.evaluation import Evaluation, Request
from qratk.evaluators.base import evaluators
from qratk.evaluators.on_landscape import LandscapeEvaluator


@final
@evaluators.register("simulated")
class SimulatedEvaluator(LandscapeEvaluator):
    """Scores configurations on a `Landscape` (the formula is in `qratk.evaluators.landscape`).

    A whole search takes seconds and needs neither model nor data, through the same loop and the same YAML. Scores on
    test data are those without noise.

    Args:
        num_layers: L.
        seed: which landscape and layers; that of the search by default.
        landscape: parameters of the surface, each a number or a range to draw from; see `LandscapeOptions`.
        importance_noise: standard deviation of the logarithm by which importance estimates are off, or a range of it.
        estimator_noise: the same for single estimators by name, as in {quantization_error: 1.0}.
        items: validation items; their outcomes differ, and their mean is the score.
        failures: share of the configurations whose evaluation fails.
        seconds_per_step: what an optimiser step is said to take.
    """

    def evaluate(self, group: Sequence[Request]) -> Sequence[Evaluation]:
        """Evaluations in the order of the requests, which may have any steps."""
        return [self.measure(request.configuration, request.steps, request.replicate) for request in group]

    def groups(self, requests: Sequence[Request]) -> Iterator[Sequence[Request]]:
        """All at once: one transaction of the journal takes longer than a thousand evaluations."""
        if requests:
            yield requests

    def discard(self, evaluation: Evaluation) -> None:
        """Nothing is stored."""
