"""What came of measuring candidates, and the evaluations that are made of it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from qratk.core.configuration import Configuration
from qratk.core.evaluation import Evaluation
from qratk.core.memory import Footprint

if TYPE_CHECKING:
    from qratk.training.measuring import Failed, Trained
    from qratk.training.module import FineTuneModule


@dataclass(frozen=True)
class OutOfMemory:
    """Memory ran out, as the error said."""

    reason: str


def caught(measure: Callable[[], Sequence[Trained | Failed]]) -> Sequence[Trained | Failed] | OutOfMemory:
    """What `measure` returns, or what went wrong that concerns the candidates alone; other errors are raised."""
    from qratk.bank.dense import is_out_of_memory
    from qratk.training.failure import NonFiniteLossError
    from qratk.training.measuring import Failed

    try:
        return measure()
    except NonFiniteLossError as error:
        return [Failed(_reason(error))]
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return OutOfMemory(_reason(error))


def free_memory(module: FineTuneModule) -> None:
    """Give back what can be made again; to be called out of the handler, whose traceback holds the step's tensors."""
    import torch

    module.backbone.dense_cache(module.options.dense_cache)  # begins empty
    gc.collect()
    torch.cuda.empty_cache()


@dataclass(frozen=True)
class Measured:
    """What was measured, and how.

    Attributes:
        configuration: the candidate's.
        steps: optimiser steps.
        footprint: bytes of the configuration.
        seconds: that it took.
        checkpoint: where its state lies if it was trained, in the run folder; None for nowhere.
        trained_as: digest of the configuration that was trained, where others may share that; None otherwise.
        replicate: that of the request.
    """

    configuration: Configuration
    steps: int
    footprint: Footprint
    seconds: float
    checkpoint: str | None
    trained_as: str | None = None
    replicate: int = 0

    def evaluation(self, outcome: Trained | Failed | OutOfMemory) -> Evaluation:
        """Evaluation with the score of an outcome, or with its reason: of the candidate ("failed") or the machine."""
        from qratk.training.measuring import Failed

        failed = Evaluation(
            self.configuration,
            self.steps,
            float("-inf"),
            self.footprint,
            status="failed",
            seconds=self.seconds,
            trained_as=self.trained_as,
            replicate=self.replicate,
        )
        if isinstance(outcome, OutOfMemory):
            return replace(failed, status="lost", reason=outcome.reason)
        if isinstance(outcome, Failed):
            return replace(failed, reason=outcome.reason)
        if not np.isfinite(outcome.score):
            return replace(failed, reason=f"the validation score is {outcome.score}")
        return replace(
            failed,
            score=outcome.score,
            status="ok",
            outcomes=outcome.outcomes,
            checkpoint=self.checkpoint,
            figures=outcome.figures,
        )


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no reason given'])[0]}"
