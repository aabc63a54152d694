"""The half of the module that scores: rows by their log-likelihood, with the adapters as they are stored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, cast

from lightning import LightningModule
from torch import Tensor, nn

from qratk.backbone.logits import labelled_logits, target_log_likelihood
from qratk.core.errors import ConfigurationError
from qratk.training.scoring import Scoring, outcomes_of

if TYPE_CHECKING:
    from qratk.data.base import TaskData
    from qratk.data.splits import Split


class ScoredModule(LightningModule, ABC):
    """Logs what a scorer of the data says of log-likelihoods, in validation and in test.

    Attributes:
        last_outcomes: outcome of each item in the last pass over a whole split; empty after another.
    """

    def __init__(self) -> None:
        super().__init__()
        self.last_outcomes: tuple[float, ...] = ()
        self._scoring = Scoring()
        self._stored = ExitStack()

    @property
    @abstractmethod
    def scored_model(self) -> nn.Module:
        """The model that is scored."""

    def log_likelihood(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Summed log-likelihoods of a scoring batch's rows, (R,) float32 in nats, and their labelled tokens, (R,)."""
        return target_log_likelihood(labelled_logits(self.scored_model, batch), batch)

    @abstractmethod
    def stored_precision(self) -> AbstractContextManager[None]:
        """Context in which the adapters have the values that are stored."""

    @property
    def task_data(self) -> TaskData:
        """The trainer's data; raises `ConfigurationError` unless they can be scored."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(data, "scorer"):
            raise ConfigurationError(f"the data must be a qratk.data.TaskData, got {type(data).__name__}")
        return cast("TaskData", data)

    def on_validation_epoch_start(self) -> None:
        """Round the adapters to what is stored, so that the score is of what is stored."""
        self._begin_scoring("validation")

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Score a batch."""
        self._scoring.score(self.scored_model, batch)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics as validation/<name>; `validation/score` is larger-is-better."""
        self._end_scoring("validation")

    def on_test_epoch_start(self) -> None:
        """As for validation."""
        self._begin_scoring("test")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Score a batch."""
        self._scoring.score(self.scored_model, batch)

    def on_test_epoch_end(self) -> None:
        """Log the metrics as test/<name>."""
        self._end_scoring("test")

    def on_predict_epoch_start(self) -> None:
        """As for validation: once for all batches."""
        self._stored.enter_context(self.stored_precision())

    def on_predict_epoch_end(self) -> None:
        """The adapters are as before."""
        self._stored.close()

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Row indices (R,), summed log-likelihoods (R,) in nats and labelled tokens (R,) of a batch.

        Raises `ConfigurationError` for a task that generates text.
        """
        if "most" in batch:
            raise ConfigurationError("predict tells likelihoods, and a task that generates text has none: use test")
        with self.stored_precision():
            log_likelihood, tokens = self.log_likelihood(batch)
        return {"row": batch["row"], "log_likelihood": log_likelihood, "tokens": tokens}

    def _begin_scoring(self, split: Split) -> None:
        self._scoring.begin(self.task_data, split, self.device, self.stored_precision())

    def _end_scoring(self, split: Split) -> None:
        (scorer,) = self._scoring.end()
        if self.trainer.sanity_checking:
            return
        whole = self.trainer.limit_val_batches if split == "validation" else self.trainer.limit_test_batches
        self.last_outcomes = outcomes_of(scorer) if whole == 1.0 else ()
        for name, value in scorer.compute().items():
            self.log(f"{split}/{name}", value.float(), prog_bar=name == "score", sync_dist=True)
