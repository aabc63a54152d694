"""What a scoring of validation data comes to."""

from __future__ import annotations

import math

from qratk.training.measuring import Trained


def test_all_metrics_but_the_score_are_figures_and_those_that_are_not_finite_are_left_out() -> None:
    metrics = {"score": -1.5, "nats_per_token": 1.5, "perplexity": math.inf, "acc": math.nan}
    assert Trained.of(metrics, (0.5,)) == Trained(-1.5, (0.5,), {"nats_per_token": 1.5})
