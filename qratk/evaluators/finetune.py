"""Evaluation by real fine-tuning: one Lightning Trainer a rung, on the shared bank of quantised weights."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError, RunDirectoryError
from qratk.core.evaluation import Evaluation, Request
from qratk.core.memory import Footprint, LayerShape, MemoryModel
from qratk.core.space import SearchSpace
from qratk.evaluators.base import EvaluationContext, Evaluator, evaluators

if TYPE_CHECKING:
    from qratk.backbone.module import FineTuneModule, TrainingState
    from qratk.data.base import TaskData
    from qratk.estimators.base import ImportanceEstimator


@evaluators.register("finetune")
class FineTuneEvaluator(Evaluator):
    """Trains the adapters of a configuration for the asked steps and scores them on validation data.

    Every candidate sees the same batches in the same order, starts from the same nested adapter weights, and
    continues from rung to rung bit-identically. Scores are of the adapters as stored, in 16 bits.

    Args:
        calibration_batches: training batches that importance is estimated on.
        calibration_batch_size: sequences in each of them.
        keep_optimizer: whether the optimiser's state is kept after the last rung too.
    """

    def __init__(
        self, calibration_batches: int = 8, calibration_batch_size: int = 8, keep_optimizer: bool = False
    ) -> None:
        if calibration_batches < 1 or calibration_batch_size < 1:
            raise ConfigurationError(
                "calibration_batches and calibration_batch_size must be at least 1, got "
                f"{calibration_batches} and {calibration_batch_size}"
            )
        self.calibration_batches = calibration_batches
        self.calibration_batch_size = calibration_batch_size
        self.keep_optimizer = keep_optimizer

    def open(self, context: EvaluationContext) -> None:
        """Load model and data. `context.trainer` makes a Trainer from keyword arguments; the default is Lightning's."""
        from lightning import Trainer

        self.context = context
        self.module: FineTuneModule = context.module
        self.data: TaskData = context.datamodule
        self.make_trainer: Callable[..., Any] = context.trainer or Trainer
        self.module.schedule_steps = self.module.schedule_steps or context.ladder.highest
        self._place()
        self.data.attach(self.module.tokenizer, context_length=self.module.context_length)
        self.data.setup("fit")
        self._footprints: dict[SearchSpace, MemoryModel] = {}
        self._announced: set[tuple[int, str, str]] = set()

    def _place(self) -> None:
        # The strategy of a throw-away trainer knows the device; importance is estimated there before any fit.
        self.device = self._trainer(max_steps=1).strategy.root_device
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

    def evaluate(self, requests: Sequence[Request]) -> Iterator[Evaluation]:
        """One after another."""
        for request in requests:
            yield self._evaluate(request.configuration, request.steps)

    def _evaluate(self, configuration: Configuration, steps: int) -> Evaluation:
        import torch

        from qratk.backbone.module import NonFiniteLossError

        began = time.monotonic()
        result = Evaluation(configuration, steps, float("-inf"), self._footprint(configuration), status="failed")
        try:
            checkpoint = self._train(configuration, steps)
            score, outcomes = self._validated()
        except (NonFiniteLossError, MemoryError, RuntimeError) as error:
            if not isinstance(error, NonFiniteLossError) and not _is_out_of_memory(error):
                raise
            torch.cuda.empty_cache()
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            return replace(result, reason=reason, seconds=time.monotonic() - began)
        seconds = time.monotonic() - began
        if not np.isfinite(score):
            return replace(result, reason=f"the validation score is {score}", seconds=seconds)
        return replace(result, score=score, status="ok", outcomes=outcomes, seconds=seconds, checkpoint=checkpoint)

    def _footprint(self, configuration: Configuration) -> Footprint:
        # References may lie off the ladders: widen them by what is asked for.
        bits = tuple(sorted({*self.space.bits, *configuration.bits}))
        ranks = tuple(sorted({*self.space.ranks, *configuration.ranks}))
        return self._memory(SearchSpace(bits, ranks, self.space.layer_names)).footprint(configuration)

    def _memory(self, space: SearchSpace) -> MemoryModel:
        if space not in self._footprints:
            self._footprints[space] = self.module.backbone.memory_model(
                space,
                batch_size=self.data.batch_size,
                sequence_length=self.data.max_length,
                gradient_checkpointing=self.module.options.gradient_checkpointing,
            )
        return self._footprints[space]

    # Training

    def _train(self, configuration: Configuration, steps: int) -> str:
        """Checkpoint of the configuration after `steps` optimiser steps; the module is left in that state."""
        self._activate(configuration)
        done, state = self._latest(configuration, steps)
        if done < steps:
            module, trainer = self.module, self._trainer(max_steps=steps - done)
            module.resume_state = state
            self.data.start_batch = done * trainer.accumulate_grad_batches
            with quiet_lightning():
                trainer.fit(module, datamodule=self.data)
            state = module.training_state()
            self._save(configuration, steps, state)
            module.resume_state = None
        return str(self._path(configuration, steps).relative_to(self.context.run_dir))

    def _save(self, configuration: Configuration, steps: int, state: TrainingState) -> None:
        from safetensors import SafetensorError

        path = self._path(configuration, steps)
        try:
            _save_state(path, state, optimizer=self._continues(steps))
        except (OSError, SafetensorError) as error:
            raise RunDirectoryError(
                f"cannot write {path}: {error}. Free some space, then run the same command to go on; what was measured "
                "before is kept."
            ) from error

    def _continues(self, steps: int) -> bool:
        return self.keep_optimizer or steps < self.context.ladder.highest

    def _activate(self, configuration: Configuration) -> None:
        self._build_bank()
        self.module.backbone.release_reference()
        self.module.activate(configuration)

    def _build_bank(self) -> None:
        backbone = self.module.backbone
        backbone.build_bank(sorted({*self.space.bits, *self.context.reference_bits}))
        groups: dict[tuple[int, str, str], list[Any]] = {}
        for fallback in backbone.fallbacks:
            groups.setdefault((fallback.bits, fallback.wanted, fallback.used), []).append(fallback)
        for key in groups.keys() - self._announced:
            more = f" (and {len(groups[key]) - 1} more projections)" if len(groups[key]) > 1 else ""
            self.context.say(f"{groups[key][0]}{more}")
            self._announced.add(key)

    def _latest(self, configuration: Configuration, steps: int) -> tuple[int, TrainingState | None]:
        """Steps and state of the highest stored rung up to `steps`, put in place."""
        from safetensors import SafetensorError

        for rung in sorted((s for s in self.context.ladder.steps if s <= steps), reverse=True):
            path = self._path(configuration, rung)
            if path.is_dir() and (rung == steps or (path / "optimizer.safetensors").exists()):
                try:
                    state = _load_state(path)
                except (OSError, SafetensorError, ValueError) as error:
                    self.context.say(f"{path} is damaged and left out, its steps are repeated: {error}")
                    continue
                self.module.backbone.load_adapter_state(state.adapter)
                return rung, state
        return 0, None

    def _path(self, configuration: Configuration, steps: int) -> Path:
        return self.context.run_dir / "checkpoints" / configuration.digest / str(steps)

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

    # Scoring

    def _validated(self) -> tuple[float, tuple[float, ...]]:
        with quiet_lightning():
            metrics = self._trainer().validate(self.module, datamodule=self.data, verbose=False)[0]
        return float(metrics["validation/score"]), self.module.last_outcomes

    def test(self, evaluation: Evaluation) -> dict[str, float]:
        """Metrics on test data of the configuration as it was at the evaluation's steps."""
        self._train(evaluation.configuration, evaluation.steps)
        with quiet_lightning():
            metrics = self._trainer().test(self.module, datamodule=self.data, verbose=False)[0]
        return {name.removeprefix("test/"): float(value) for name, value in metrics.items()}

    def discard(self, evaluation: Evaluation) -> None:
        """Delete a checkpoint; one that is gone already is no error."""
        path = self._path(evaluation.configuration, evaluation.steps)
        shutil.rmtree(path, ignore_errors=True)
        if path.parent.is_dir() and not any(path.parent.iterdir()):
            path.parent.rmdir()

    @property
    def item_weights(self) -> tuple[float, ...] | None:
        """Those of the validation items."""
        return self.data.item_weights("validation")

    def fingerprint(self) -> dict[str, str]:
        """Digests of the model with its quantisers, and of the data."""
        return {"model": self.module.backbone.digest(), "data": self.data.fingerprint()}


def _is_out_of_memory(error: Exception) -> bool:
    import torch

    # The CPU allocator raises a plain RuntimeError.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


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


def _save_state(path: Path, state: TrainingState, *, optimizer: bool) -> None:
    """Write a state in one step: a kill leaves either all of it or nothing."""
    from safetensors.torch import save_file

    part = path.with_name(f"{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in state.adapter.items()}, part / "adapter.safetensors")
    if optimizer:
        save_file({**state.optimizer, "random": state.random}, part / "optimizer.safetensors")
    (part / "state.json").write_text(json.dumps({"steps": state.steps}))
    for file in (*part.iterdir(), part):
        _flush(file)
    shutil.rmtree(path, ignore_errors=True)
    os.replace(part, path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _load_state(path: Path) -> TrainingState:
    import torch
    from safetensors.torch import load_file

    from qratk.backbone.module import TrainingState

    moments = load_file(path / "optimizer.safetensors") if (path / "optimizer.safetensors").exists() else {}
    random = moments.pop("random", torch.get_rng_state())
    steps = json.loads((path / "state.json").read_text())["steps"]
    return TrainingState(steps, load_file(path / "adapter.safetensors"), moments, random)
