"""Evaluation by real fine-tuning: one Lightning Trainer a rung, on the shared bank of quantised weights."""

from __future__ import annotations

import gc
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError, RunDirectoryError
from qratk.core.evaluation import Evaluation, Request
from qratk.core.memory import Footprint, LayerShape, MemoryModel
from qratk.core.space import SearchSpace
from qratk.evaluators.base import EvaluationContext, Evaluator, evaluators
from qratk.run import files
from qratk.training.checkpoints import continues, discard_state, load_state, save_state

if TYPE_CHECKING:
    from qratk.estimators.base import ImportanceEstimator
    from qratk.training.module import TrainingState


_LARGEST_COHORT = 32


@dataclass(frozen=True)
class OutOfMemory:
    """Memory ran out, as the error said."""

    reason: str


@dataclass(frozen=True)
class Trained:
    """What came of a training: the validation score and the outcome of each item."""

    score: float
    outcomes: tuple[float, ...]


@evaluators.register("finetune")
class FineTuneEvaluator(Evaluator):
    """Trains the adapters of a configuration for the asked steps and scores them on validation data.

    Every candidate sees the same batches in the same order, starts from the same nested adapter weights, and
    continues from rung to rung bit-identically. Scores are of the adapters as stored, in 16 bits.

    Candidates that continue from the same rung are trained side by side in one pass, `cohort` of them: faster where
    steps are short, and each is trained as it would be alone, but for the order of additions (1e-5 of a loss).

    Args:
        calibration_batches: training batches that importance is estimated on.
        calibration_batch_size: sequences in each of them.
        keep_optimizer: whether the optimiser's state is kept after the last rung too.
        cohort: candidates trained side by side; 1 is one after another, "auto" tries 1, 2, 4, ... for two steps each
            and takes what is fastest, within half of the memory that is free.
    """

    def __init__(
        self,
        calibration_batches: int = 8,
        calibration_batch_size: int = 8,
        keep_optimizer: bool = False,
        cohort: int | Literal["auto"] = "auto",
    ) -> None:
        if calibration_batches < 1 or calibration_batch_size < 1:
            raise ConfigurationError(
                "calibration_batches and calibration_batch_size must be at least 1, got "
                f"{calibration_batches} and {calibration_batch_size}"
            )
        if cohort != "auto" and (not isinstance(cohort, int) or cohort < 1):
            raise ConfigurationError(f"cohort must be 'auto' or at least 1, got {cohort!r}")
        self.cohort = cohort
        self.calibration_batches = calibration_batches
        self.calibration_batch_size = calibration_batch_size
        self.keep_optimizer = keep_optimizer

    def open(self, context: EvaluationContext) -> None:
        """Load model and data. `context.trainer` makes a Trainer from keyword arguments; the default is Lightning's."""
        from lightning import Trainer

        if context.module is None or context.datamodule is None:
            raise ConfigurationError(
                "this evaluator fine-tunes: it needs a model and data, and was given neither or one"
            )
        self.context = context
        self.module = context.module
        self.data = context.datamodule
        self.make_trainer: Callable[..., Trainer] = context.trainer or Trainer
        self.module.schedule_steps = self.module.schedule_steps or context.ladder.highest
        self._place()
        self.data.attach(self.module.tokenizer, context_length=self.module.context_length)
        self.data.setup("fit")
        self.module.calibrate(self.data)
        self._footprints: dict[SearchSpace, MemoryModel] = {}
        self._announced: set[str] = set()
        self._fastest: int | None = None
        self._fitting = sys.maxsize  # candidates side by side, once more of them did not fit into memory
        self._tried_sharing = False
        self._explained = False

    def _place(self) -> None:
        from qratk.training.module import require_precision
        from qratk.training.sharding import require_strategy

        # The strategy of a throw-away trainer knows the device; importance is estimated there before any fit.
        trainer = self._trainer(max_steps=1)
        require_precision(trainer)
        require_strategy(trainer.strategy, sharded=False)
        self.device, self._precision = trainer.strategy.root_device, str(trainer.precision)
        self.module.backbone.model.to(self.device)

    @property
    def shapes(self) -> tuple[LayerShape, ...]:
        """The backbone's layers."""
        return self.module.backbone.shapes

    def memory_model(self, space: SearchSpace) -> MemoryModel:
        """Exact bytes; the peaks are for the datamodule's batch size and length."""
        self.space = space
        return self._memory(space)

    def importance(self, estimator: ImportanceEstimator, space: SearchSpace) -> NDArray[np.float64]:
        """Raw layer scores on training batches, before the full-precision weights are dropped."""
        backbone = self.module.backbone
        self._build_bank()
        backbone.activate(Configuration.uniform(16, 0, space.num_layers), seed=self.module.options.seed)
        batches = [
            {name: tensor.to(self.device) for name, tensor in batch.items()}
            for batch in self.data.calibration_batches(self.calibration_batches, self.calibration_batch_size)
        ]
        return np.asarray(estimator.estimate(self.module, batches, lowest_bits=space.bits[0]), dtype=np.float64)

    def groups(self, requests: Sequence[Request]) -> Iterator[Sequence[Request]]:
        """Requests that continue from the same rung, in cohorts of nearly equal size."""
        for _, together in groupby(requests, key=lambda r: (r.steps, self._begins_at(r))):
            rest = list(together)
            while rest:
                # The same for the rest of a list as for the whole: a resumed search asks for the rest.
                size = -(-len(rest) // -(-len(rest) // self._cohort_size(rest)))
                yield rest[:size]
                rest = rest[size:]

    def evaluate(self, requests: Sequence[Request]) -> Iterator[Evaluation]:
        """Group by group."""
        for group in self.groups(requests):
            yield from self._evaluate([request.configuration for request in group], group[0].steps)

    def _evaluate(self, configurations: Sequence[Configuration], steps: int) -> list[Evaluation]:
        began = time.monotonic()
        outcomes = self._outcomes(configurations, steps)
        if isinstance(outcomes, OutOfMemory):  # out of its handler, whose traceback held the tensors of the step
            self._free_memory()
            if len(configurations) > 1:
                return self._in_halves(configurations, steps)
        found = [outcomes] if isinstance(outcomes, OutOfMemory) else outcomes
        seconds = (time.monotonic() - began) / len(configurations)
        return [
            self._evaluation(configuration, steps, outcome, seconds)
            for configuration, outcome in zip(configurations, found, strict=True)
        ]

    def _outcomes(self, configurations: Sequence[Configuration], steps: int) -> list[Trained | str] | OutOfMemory:
        if len(configurations) > 1:
            return self._caught(lambda: list(self._side_by_side(configurations, steps)))
        return self._caught(lambda: [self._alone(configurations[0], steps)])

    @staticmethod
    def _caught(measure: Callable[[], list[Trained | str]]) -> list[Trained | str] | OutOfMemory:
        """What `measure` returns, or what went wrong that concerns the candidate alone."""
        from qratk.bank.dense import is_out_of_memory
        from qratk.training.module import NonFiniteLossError

        try:
            return measure()
        except NonFiniteLossError as error:
            return [_reason(error)]
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return OutOfMemory(_reason(error))

    def _free_memory(self) -> None:
        import torch

        self.module.backbone.dense_cache(self.module.options.dense_cache)  # begins empty
        gc.collect()
        torch.cuda.empty_cache()

    def _evaluation(
        self, configuration: Configuration, steps: int, outcome: Trained | str | OutOfMemory, seconds: float
    ) -> Evaluation:
        footprint = self.footprint(configuration)
        failed = Evaluation(configuration, steps, float("-inf"), footprint, status="failed", seconds=seconds)
        if isinstance(outcome, OutOfMemory):
            return replace(failed, status="lost", reason=outcome.reason)
        if isinstance(outcome, str):
            return replace(failed, reason=outcome)
        if not np.isfinite(outcome.score):
            return replace(failed, reason=f"the validation score is {outcome.score}")
        return replace(
            failed,
            score=outcome.score,
            status="ok",
            outcomes=outcome.outcomes,
            checkpoint=str(self._path(configuration, steps).relative_to(self.context.run_dir)),
        )

    def _cohort_size(self, requests: Sequence[Request]) -> int:
        """How many of these to train side by side, at most."""
        configurations = [request.configuration for request in requests]
        # A scaler of gradients is common to all, and so are the draws of dropout, which a rank of 0 leaves out.
        alone = self._precision == "16-mixed" or (
            self.module.options.lora_dropout > 0 and any(0 in c.ranks for c in configurations)
        )
        if refusal := self.module.backbone.adapters.method.refusal("side by side"):
            self._explain_alone(refusal)
            return 1
        if alone or len(configurations) == 1:
            return 1
        if self.cohort != "auto":
            return self._within_memory(self.cohort)
        if self._fastest is None:
            self._fastest = int(self.context.decided("cohort", lambda: self._fastest_cohort(configurations)))
        return self._within_memory(self._fastest)

    def _within_memory(self, size: int) -> int:
        """At most so many side by side that memory did not run out, in any process, also before a resume."""
        halves = (self.context.recorded(f"cohort/{count}") for count in range(2, size + 1))
        return min([size, self._fitting, *(int(half) for half in halves if half is not None)])

    def _explain_alone(self, refusal: str) -> None:
        if self.cohort != 1 and not self._explained:
            self.context.say(f"Candidates are trained one by one: {refusal}.")
        self._explained = True

    def _fastest_cohort(self, configurations: Sequence[Configuration]) -> int:
        from qratk.bank.dense import available_memory
        from qratk.training.cohort_speed import fastest_cohort

        self._prepare()
        # For larger groups than this one too; with workers, no more than leaves work for each of them.
        share = -(-len(configurations) // self.context.workers)
        largest = _LARGEST_COHORT if self.context.workers == 1 else min(_LARGEST_COHORT, share)
        configurations = [c for c in configurations if any(c.ranks)]
        if not configurations:
            return 1
        footprints = [self.footprint(configuration) for configuration in configurations]
        each = max(f.training_bytes - f.weights - f.metadata - f.fixed for f in footprints)
        room = available_memory(self.device) // 2 // max(1, each)
        (batch,) = self.data.calibration_batches(1)
        return fastest_cohort(
            self.module,
            self._trainer(max_steps=1),
            {name: tensor.to(self.device) for name, tensor in batch.items()},
            configurations,
            largest=min(int(room), largest),
        )

    def _in_halves(self, configurations: Sequence[Configuration], steps: int) -> list[Evaluation]:
        count = len(configurations)
        half = self._fitting = int(self.context.decided(f"cohort/{count}", lambda: (count + 1) // 2))
        self.context.say(
            f"{count} candidates side by side do not fit into memory; going on with {half}. "
            f"Set --search.evaluator.cohort={half} to begin there."
        )
        return self._evaluate(configurations[:half], steps) + self._evaluate(configurations[half:], steps)

    def footprint(self, configuration: Configuration) -> Footprint:
        """Exact bytes of a configuration."""
        # References may lie off the ladders: widen them by what is asked for.
        bits = tuple(sorted({*self.space.bits, *configuration.bits}))
        ranks = tuple(sorted({*self.space.ranks, *configuration.ranks}))
        return self._memory(SearchSpace(bits, ranks, self.space.layer_names)).footprint(configuration)

    def _memory(self, space: SearchSpace) -> MemoryModel:
        from qratk.peaks.foretold import memory_model

        if space not in self._footprints:
            self._footprints[space] = memory_model(
                self.module.backbone,
                space,
                batch_size=self.data.batch_size,
                sequence_length=self.data.max_length,
                gradient_checkpointing=self.module.options.gradient_checkpointing,
            )
        return self._footprints[space]

    # Training

    def _alone(self, configuration: Configuration, steps: int) -> Trained:
        self._train(configuration, steps)
        return self._validated()

    def _validated(self) -> Trained:
        with quiet_lightning():
            metrics = self._trainer().validate(self.module, datamodule=self.data, verbose=False)[0]
        return Trained(float(metrics["validation/score"]), self.module.last_outcomes)

    def _train(self, configuration: Configuration, steps: int) -> None:
        """Leaves the module as it is after `steps` optimiser steps on a configuration, and that in a checkpoint."""
        self._activate(configuration)
        done, state = self._latest(configuration, steps)
        if state is not None:
            self.module.backbone.load_adapter_state(state.adapter)
        if done == steps or not any(configuration.ranks):
            return
        module, trainer = self.module, self._trainer(max_steps=steps - done)
        module.resume_state = state
        self.data.start_batch = done * trainer.accumulate_grad_batches
        with quiet_lightning():
            trainer.fit(module, datamodule=self.data)
        state = module.training_state()
        self._save(configuration, steps, state)
        module.resume_state = None

    def _side_by_side(self, configurations: Sequence[Configuration], steps: int) -> Iterator[Trained | str]:
        """For each configuration what came of it, or why it failed."""
        from qratk.training.cohort import Cohort
        from qratk.training.cohort_module import CohortModule

        backbone, data = self.module.backbone, self.data
        self._prepare()
        done, states = self._common_state(configurations, steps)
        cohort = Cohort.of(backbone, configurations, seed=self.module.options.seed)
        self._try_sharing(configurations[0])
        with cohort.installed(), quiet_lightning():
            module = CohortModule(self.module, cohort, states)
            train = done < steps and bool(cohort.parameters())
            if train:
                trainer = self._trainer(max_steps=steps - done)
                data.start_batch = done * trainer.accumulate_grad_batches
                module.train()
                trainer.fit(module, datamodule=data)
                states = module.training_states()
            self._trainer().validate(module, datamodule=data, verbose=False)
        for member, configuration in enumerate(configurations):
            if member in module.failures:
                yield f"NonFiniteLossError: {module.failures[member]}"
                continue
            if train:
                self._save(configuration, steps, states[member])
            yield Trained(*module.scores[member])

    def _save(self, configuration: Configuration, steps: int, state: TrainingState) -> None:
        from safetensors import SafetensorError

        path = self._path(configuration, steps)
        try:
            save_state(path, state, optimizer=self._continues(steps))
        except (OSError, SafetensorError) as error:
            raise RunDirectoryError(
                f"cannot write {path}: {error}. Free some space, then run the same command to go on; what was measured "
                "before is kept."
            ) from error

    def _continues(self, steps: int) -> bool:
        return self.keep_optimizer or steps < self.context.ladder.highest

    def _activate(self, configuration: Configuration) -> None:
        self._prepare()
        self.module.activate(configuration)

    def _prepare(self) -> None:
        self._build_bank()
        self.module.backbone.release_reference()

    def _build_bank(self) -> None:
        backbone = self.module.backbone
        backbone.say = self.context.say
        bits = sorted({*self.space.bits, *self.context.reference_bits})
        backbone.build_bank(bits)
        ranks = sorted({*self.space.ranks, *self.context.reference_ranks})
        self.module.build_initial([(b, r) for b in bits for r in ranks], self.data)
        for note in backbone.notes:
            if note not in self._announced:
                self.context.say(note)
                self._announced.add(note)

    def _latest(self, configuration: Configuration, steps: int) -> tuple[int, TrainingState | None]:
        """Steps and state of the highest stored rung up to `steps`."""
        from safetensors import SafetensorError

        for rung, path in self._stored(configuration, steps):
            try:
                return rung, load_state(path)
            except (OSError, SafetensorError, ValueError) as error:
                self.context.say(f"{path} is damaged and left out, its steps are repeated: {error}")
        return 0, None

    def _try_sharing(self, configuration: Configuration) -> None:
        # The module tries its model once, when it is first asked, and that must not be while a cohort is in it.
        if not self._tried_sharing and self.data.shares_prompts("validation"):
            self.module.activate(configuration)
            _ = self.module.shared_length
        self._tried_sharing = True

    def _common_state(self, configurations: Sequence[Configuration], steps: int) -> tuple[int, list[TrainingState]]:
        """Steps that all of them have done, up to `steps`, and their states there: none at 0 steps."""
        while True:
            latest = [self._latest(configuration, steps) for configuration in configurations]
            lowest = min(done for done, _ in latest)
            if all(done == lowest for done, _ in latest):
                return lowest, [state for _, state in latest if state is not None]
            steps = lowest  # one of them was not saved, or is damaged: all go back

    def _stored(self, configuration: Configuration, steps: int) -> Iterator[tuple[int, Path]]:
        """Stored rungs that can be scored at `steps`, or continued to there, the highest first."""
        for rung in sorted((s for s in self.context.ladder.steps if s <= steps), reverse=True):
            path = self._path(configuration, rung)
            if path.is_dir() and (rung == steps or continues(path)):
                yield rung, path

    def _begins_at(self, request: Request) -> int:
        return next((rung for rung, _ in self._stored(request.configuration, request.steps - 1)), 0)

    def _path(self, configuration: Configuration, steps: int) -> Path:
        return self.context.run_dir / files.CHECKPOINTS / configuration.digest / str(steps)

    def _trainer(self, **options: Any) -> Any:
        quiet = {
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "check_val_every_n_epoch": None,
            "val_check_interval": None,
            "max_epochs": -1,
        }
        with quiet_lightning():
            return self.make_trainer(**{**quiet, **options})

    # The answer

    def test(self, evaluation: Evaluation) -> dict[str, float]:
        """Metrics on test data of the configuration as it was at the evaluation's steps."""
        self._train(evaluation.configuration, evaluation.steps)
        with quiet_lightning():
            metrics = self._trainer().test(self.module, datamodule=self.data, verbose=False)[0]
        return {name.removeprefix("test/"): float(value) for name, value in metrics.items()}

    def prepare_test(self) -> bool:
        """Read and encode the test split; False when the data have none."""
        self.data.setup("test")
        return self.data.has("test")

    def discard(self, evaluation: Evaluation) -> None:
        """Delete a checkpoint; one that is gone already is no error."""
        discard_state(self._path(evaluation.configuration, evaluation.steps))

    @property
    def item_weights(self) -> tuple[float, ...] | None:
        """Those of the validation items."""
        return self.data.item_weights("validation")

    def fingerprint(self) -> dict[str, str]:
        """Digests of the model with its quantisers, and of the data."""
        return {"model": self.module.backbone.digest(), "data": self.data.fingerprint()}


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no reason given'])[0]}"


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Context without Lightning's notes on every Trainer: a search makes hundreds of them."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
