"""What fine-tuning is done with, put together from a model, data and the Trainers of a command."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from lightning import Trainer
from torch import Tensor

from qratk.backbone.loading import dtype_name, resolve_dtype
from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError
from qratk.core.evaluation import seeds_of
from qratk.core.memory import Footprint
from qratk.data.base import TaskData
from qratk.evaluators._footprints import Footprints
from qratk.evaluators.base import EvaluationContext
from qratk.run import files
from qratk.training.cohort_speed import LARGEST, fastest_cohort, fitting
from qratk.training.grouping import CohortLimits
from qratk.training.measuring import Alone, SideBySide
from qratk.training.module import FineTuneModule
from qratk.training.precision import require_precision
from qratk.training.preparation import Preparation, calibrate
from qratk.training.rungs import Rungs
from qratk.training.sharding import require_strategy
from qratk.training.trainers import QuietTrainers


@dataclass(frozen=True)
class FineTuning:
    """What an open evaluator measures with, on one device."""

    context: EvaluationContext
    module: FineTuneModule
    data: TaskData
    device: torch.device
    precision: str
    trainers: QuietTrainers
    rungs: Rungs
    footprints: Footprints
    preparation: Preparation
    alone: Alone
    side_by_side: SideBySide

    @classmethod
    def of(cls, context: EvaluationContext, *, keep_optimizer: bool) -> FineTuning:
        """Everything, with model and data loaded; raises `ConfigurationError` for what a search cannot have."""
        if context.module is None or context.datamodule is None:
            raise ConfigurationError(
                "this evaluator fine-tunes: it needs a model and data, and was given neither or one"
            )
        if given := context.module.options.replicate:
            raise ConfigurationError(
                f"model.replicate={given} is for a fit: a search gives its trainings their own; leave it out, and give "
                "other seeds for another search"
            )
        module, data, trainers = context.module, context.datamodule, QuietTrainers(context.trainer or Trainer)
        module.schedule_steps = module.schedule_steps or context.ladder.highest
        _settle_compute_dtype(module, context)
        device, precision = _placed(module, trainers)
        data.attach(module.tokenizer, context_length=module.context_length)
        data.setup("fit")
        calibrate(module.backbone, module.options, data)
        method = module.backbone.adapters.method
        rungs = Rungs(context.run_dir / files.CHECKPOINTS, context.ladder, keep_optimizer, context.say, method.trained)
        needed = {"reference_bits": context.reference_bits, "reference_ranks": context.reference_ranks}
        return cls(
            context,
            module,
            data,
            device,
            precision,
            trainers,
            rungs,
            Footprints(module, data),
            Preparation(module.backbone, module.options, data, **needed, say=context.say),
            Alone(module, data, trainers, rungs),
            SideBySide(module, data, trainers, rungs),
        )

    @contextmanager
    def replicated(self, configuration: Configuration, replicate: int = 0) -> Iterator[FineTuning]:
        """Context in which trainings have the seeds of a configuration, or fresh ones, with what measures there.

        Fresh are the order of the training rows, the first values of adapters, and dropout; which rows are in which
        split, and what is calibrated on, stay. States lie in a folder of the replicate's own.
        """
        number = seeds_of(configuration, replicate)
        if not number:
            yield self
            return
        module, data, rungs = self.module, self.data, self.rungs.of_replicate(replicate)
        given = module.options
        module.options = replace(given, replicate=number)
        data.replicate = number
        try:
            yield replace(
                self,
                rungs=rungs,
                alone=Alone(module, data, self.trainers, rungs),
                side_by_side=SideBySide(module, data, self.trainers, rungs),
            )
        finally:
            module.options, data.replicate = given, 0

    @contextmanager
    def scored_at(self, steps: int) -> Iterator[None]:
        """Context in which validation scores the items of a rung; elsewhere it scores all, as at the highest rung."""
        ladder = self.context.ladder
        self.data.rung = None if steps == ladder.highest else ladder.steps.index(steps)
        try:
            yield
        finally:
            self.data.rung = None

    @property
    def limits(self) -> CohortLimits:
        """What keeps candidates from being trained side by side."""
        return CohortLimits(
            refusal=self.module.backbone.adapters.method.refusal("side by side"),
            scaled_gradients=self.precision == "16-mixed",
            dropout=self.module.options.lora_dropout > 0,
        )

    def calibration_batches(self, count: int, batch_size: int | None = None) -> list[dict[str, Tensor]]:
        """Training batches, on the device."""
        batches = self.data.calibration_batches(count, batch_size)
        return [{name: tensor.to(self.device) for name, tensor in batch.items()} for batch in batches]

    def fastest_cohort(
        self, configurations: Sequence[Configuration], footprints: Sequence[Footprint], *, asked: int
    ) -> int:
        """How many such configurations, of such footprints, to train side by side, where `asked` for so many at once.

        The bank must be built.
        """
        (batch,) = self.calibration_batches(1)
        workers = self.context.workers
        # For larger groups than this one too; with workers, no more than leaves work for each of them.
        share = LARGEST if workers == 1 else -(-asked // workers)
        largest = min(fitting(self.device, footprints), LARGEST, share)
        return fastest_cohort(self.module, self.trainers.training(1), batch, configurations, largest=largest)

    def trained_as(self, configuration: Configuration) -> str | None:
        """Digest of the configuration that is trained for one, where others may share that; None otherwise."""
        method = self.module.backbone.adapters.method
        return method.trained(configuration).digest if method.shares_trainings else None

    def checkpoint(self, configuration: Configuration, steps: int, replicate: int = 0) -> str:
        """Where a state lies, in the run folder."""
        path = self.rungs.of_replicate(replicate).path(configuration, steps)
        return str(path.relative_to(self.context.run_dir))


def _settle_compute_dtype(module: FineTuneModule, context: EvaluationContext) -> None:
    """Have the module compute as the search began to, where "auto" would go by the machine that it is resumed on."""
    if module.options.compute_dtype != "auto":
        return
    known = context.recorded("compute_dtype")
    if known is None and context.recorded("importance") is not None:  # a search from before that was recorded
        known = dtype_name(resolve_dtype("auto"))
    if known is None:
        context.decided("compute_dtype", lambda: dtype_name(module.backbone.compute_dtype))
    else:
        module.options = replace(module.options, compute_dtype=known)


def _placed(module: FineTuneModule, trainers: QuietTrainers) -> tuple[torch.device, str]:
    """Device and precision of the Trainers; the model is there afterwards, for importance is estimated before any fit.

    Raises `ConfigurationError` for a precision or strategy that a search cannot have.
    """
    trainer = trainers.training(1)  # its strategy knows the device
    require_precision(trainer)
    require_strategy(trainer.strategy, sharded=False)
    device = trainer.strategy.root_device
    module.backbone.model.to(device)
    return device, str(trainer.precision)
