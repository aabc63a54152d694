"""Evaluation whose lowest rung trains nothing: the divergence of the frozen quantised model from the full one."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from qratk.core.configuration import Configuration, Knob
from qratk.core.errors import ConfigurationError
from qratk.core.evaluation import Evaluation, Request
from qratk.core.memory import Footprint, LayerShape, MemoryModel
from qratk.core.shared import SharedLadder
from qratk.core.space import SearchSpace
from qratk.evaluators._outcomes import Measured, OutOfMemory, caught, free_memory
from qratk.evaluators.base import EvaluationContext, Evaluator, evaluators
from qratk.evaluators.finetune import FineTuneEvaluator

if TYPE_CHECKING:
    from qratk.estimators.base import ImportanceEstimator
    from qratk.training.divergence import FrozenDivergence
    from qratk.training.measuring import Trained

Positions = Literal["labelled", "all"]
Stored = Literal["float32", "float16"]


@evaluators.register("frozen_divergence")
class FrozenDivergenceEvaluator(Evaluator):
    """Scores frozen quantised weights at the lowest rung, and fine-tunes from step 0 at the higher ones.

    At the lowest rung the score is minus the Jensen-Shannon divergence, in nats, between the next-token distributions
    of the quantised model without adapters and of the full-precision one, averaged over positions of the calibration
    batches: the proxy by which AMQ searches bit-widths (Lee et al. 2025, arXiv:2509.12019). It takes no optimiser step
    and leaves no checkpoint, whatever number the rung has, and depends on the bits alone: configurations that differ in
    rank share one score, computed once. There is one outcome a sequence, and their mean is the score.

    Log-probabilities of the full-precision model are computed once, before its weights are released, and stay in main
    memory: positions * vocabulary * 4 bytes (2 with `stored: float16`), so 0.6 GiB for 1,024 positions and 151,936
    tokens. `max_positions` bounds them.

    Args:
        calibration_batches: training batches that divergence, and importance, are measured on.
        calibration_batch_size: sequences in each of them.
        positions: those that predict a labelled token, or "all" that predict a token.
        max_positions: at most as many positions, evenly spaced among those there are; null for all of them.
        stored: type of the stored log-probabilities.
        keep_optimizer, cohort: as for `finetune`, at the higher rungs.
    """

    def __init__(
        self,
        calibration_batches: int = 8,
        calibration_batch_size: int = 8,
        positions: Positions = "labelled",
        max_positions: int | None = 4096,
        stored: Stored = "float32",
        keep_optimizer: bool = False,
        cohort: int | Literal["auto"] = "auto",
    ) -> None:
        self._finetune = FineTuneEvaluator(calibration_batches, calibration_batch_size, keep_optimizer, cohort)
        if positions not in get_args(Positions) or stored not in get_args(Stored):
            raise ConfigurationError(
                f"positions must be one of {get_args(Positions)} and stored one of {get_args(Stored)}, got "
                f"{positions!r} and {stored!r}"
            )
        if max_positions is not None and max_positions < 1:
            raise ConfigurationError(f"max_positions must be at least 1, or null for all, got {max_positions}")
        self.positions: Positions = positions
        self.max_positions = max_positions
        self.stored: Stored = stored
        self._lowest = 0
        self._frozen: FrozenDivergence | None = None

    def open(self, context: EvaluationContext) -> None:
        """Load model and data; raises `ConfigurationError` for a ladder of one rung, where nothing would be trained."""
        if len(context.ladder.steps) < 2:
            raise ConfigurationError(
                "the evaluator 'frozen_divergence' trains nothing at the lowest rung, and the steps "
                f"{list(context.ladder.steps)} have no other; put a rung before them, as in [1, 900]"
            )
        import torch

        from qratk.training.divergence import FrozenDivergence

        self._lowest = context.ladder.lowest
        self._finetune.open(context)
        parts = self._finetune.parts
        batches = parts.data.calibration_batches(
            self._finetune.calibration_batches, self._finetune.calibration_batch_size
        )
        self._frozen = FrozenDivergence(
            parts.module,
            parts.device,
            batches,
            kind=self.positions,
            most=self.max_positions,
            dtype=getattr(torch, self.stored),
        )
        parts.preparation.before_release(self._frozen.take_targets)

    @property
    def shapes(self) -> tuple[LayerShape, ...]:
        """The backbone's layers."""
        return self._finetune.shapes

    @property
    def replicates(self) -> bool:
        """As for fine-tuning; the lowest rung draws nothing."""
        return True

    @property
    def proxy(self) -> str:
        """The divergence is of the frozen weights."""
        return "minus the divergence of the frozen model"

    def training(self, configuration: Configuration) -> str:
        """As for fine-tuning."""
        return self._finetune.training(configuration)

    def check_shared(self, ladder: SharedLadder) -> None:
        """As for fine-tuning; no setting decides the lowest rung."""
        self._finetune.check_shared(ladder)

    def memory_model(self, space: SearchSpace) -> MemoryModel:
        """As for fine-tuning."""
        return self._finetune.memory_model(space)

    def footprint(self, configuration: Configuration) -> Footprint:
        """As for fine-tuning."""
        return self._finetune.footprint(configuration)

    def importance(self, estimator: ImportanceEstimator, space: SearchSpace) -> NDArray[np.float64]:
        """As for fine-tuning."""
        return self._finetune.importance(estimator, space)

    def importances(self, asked: Sequence[ImportanceEstimator], space: SearchSpace) -> Sequence[NDArray[np.float64]]:
        """As of the fine-tuning evaluator."""
        return self._finetune.importances(asked, space)

    def importance_by_rung(
        self, estimator: ImportanceEstimator, space: SearchSpace, knob: Knob
    ) -> NDArray[np.float64] | None:
        """As for fine-tuning."""
        return self._finetune.importance_by_rung(estimator, space, knob)

    def groups(self, requests: Sequence[Request]) -> Iterator[Sequence[Request]]:
        """At the lowest rung one by one, above it as for fine-tuning."""
        for proxy, together in groupby(requests, key=lambda request: self._is_proxy(request.steps)):
            if proxy:
                yield from ((request,) for request in together)
            else:
                yield from self._finetune.groups(list(together))

    def evaluate(self, group: Sequence[Request]) -> Sequence[Evaluation]:
        """Divergences at the lowest rung, above it what fine-tuning comes to."""
        if not self._is_proxy(group[0].steps):
            return self._finetune.evaluate(group)
        return [
            replace(self._compared(request.configuration, request.steps), replicate=request.replicate)
            for request in group
        ]

    def test(self, evaluation: Evaluation) -> dict[str, float]:
        """As for fine-tuning; of an evaluation at the lowest rung, metrics of the model without adapters."""
        if self._is_proxy(evaluation.steps):
            bits = evaluation.configuration.bits
            evaluation = replace(evaluation, configuration=Configuration.of(bits, [0] * len(bits)))
        return self._finetune.test(evaluation)

    def prepare_test(self) -> bool:
        """As for fine-tuning."""
        return self._finetune.prepare_test()

    def discard(self, evaluation: Evaluation) -> None:
        """As for fine-tuning; at the lowest rung there is nothing to delete."""
        self._finetune.discard(evaluation)

    @property
    def item_weights(self) -> tuple[float, ...] | None:
        """As for fine-tuning."""
        return self._finetune.item_weights

    def fingerprint(self) -> dict[str, str]:
        """As for fine-tuning."""
        return self._finetune.fingerprint()

    def _is_proxy(self, steps: int) -> bool:
        return steps == self._lowest

    # The proxy

    def _compared(self, configuration: Configuration, steps: int) -> Evaluation:
        began = time.monotonic()
        outcomes = caught(lambda: [self._score(configuration)])
        if isinstance(outcomes, OutOfMemory):
            free_memory(self._finetune.parts.module)
        outcome = outcomes if isinstance(outcomes, OutOfMemory) else outcomes[0]
        seconds = time.monotonic() - began
        return Measured(configuration, steps, self.footprint(configuration), seconds, None).evaluation(outcome)

    def _score(self, configuration: Configuration) -> Trained:
        assert self._frozen is not None, "open comes first"
        self._finetune.parts.preparation.finish(self._finetune.space)
        return self._frozen.score(configuration)
