"""Fits and evaluations on a tiny model and data."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from qratk.core import Candidate, Configuration, Evaluation, FidelityLadder, Request, SearchSpace
from qratk.data.multiple_choice import MultipleChoiceData
from qratk.evaluators.base import EvaluationContext
from qratk.evaluators.finetune import FineTuneEvaluator
from qratk.training.module import FineTuneModule

MIXED = "2:2 4:4 8:2"
QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "max_epochs": -1,
    "use_distributed_sampler": False,
}


@dataclass(frozen=True)
class Files:
    """Where the model and the data lie."""

    model: str
    data: dict[str, str]


class Losses(Callback):
    """Remembers the loss of every micro-batch."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *rest: Any) -> None:
        self.values.append(float(outputs["loss"]))


def make_module(files: Files, **options: Any) -> FineTuneModule:
    """Module of the tiny model with a mixed configuration."""
    return FineTuneModule(files.model, **{"configuration": MIXED, "learning_rate": 1e-2, "bank_dir": None, **options})


def make_data(files: Files, *, batch_size: int = 4) -> MultipleChoiceData:
    """The data, scored by likelihood."""
    return MultipleChoiceData(**files.data, batch_size=batch_size, score="log_likelihood")


def fitted(
    files: Files,
    *,
    steps: int = 4,
    batch_size: int = 4,
    module: FineTuneModule | None = None,
    keep: str | Path | None = None,
    resume: str | None = None,
    **trainer: Any,
) -> tuple[FineTuneModule, list[float], float]:
    """Module, losses and validation score after a fit, which keeps a checkpoint of every second step in a folder."""
    module, losses, data = module or make_module(files), Losses(), make_data(files, batch_size=batch_size)
    kept = [ModelCheckpoint(keep, filename="{step}", every_n_train_steps=2, save_top_k=-1)] if keep else []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
        warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
        given = {"accelerator": "cpu", "devices": 1, **QUIET, **trainer}
        extra = {"limit_val_batches": 0, "callbacks": [losses, *kept], "enable_checkpointing": bool(keep)}
        Trainer(max_steps=steps, **{**given, **extra}).fit(module, datamodule=data, ckpt_path=resume)
        (metrics,) = Trainer(**given).validate(module, datamodule=data, verbose=False)
    return module, losses.values, float(metrics["validation/score"])


def opened(run_dir: Path, files: Files, trainer: dict[str, Any], *, cohort: int = 1, **options: Any) -> Any:
    """Evaluator of the tiny model over rungs of 2, 4 and 6 steps."""
    module = make_module(files, configuration=None, **options)
    evaluator = FineTuneEvaluator(calibration_batches=1, calibration_batch_size=2, cohort=cohort)
    ladder = FidelityLadder((2, 4, 6))
    make: Any = lambda **more: Trainer(**{**trainer, **more})  # noqa: E731
    evaluator.open(EvaluationContext(run_dir, ladder, 0, module, make_data(files), make))
    evaluator.memory_model(SearchSpace((2, 4, 8), (2, 4), tuple(shape.name for shape in evaluator.shapes)))
    return evaluator


def evaluated(evaluator: Any, steps: int, *texts: str) -> list[Evaluation]:
    """Evaluations of configurations after so many steps."""
    candidates = [Candidate(Configuration.from_text(text), "test") for text in texts or (MIXED,)]
    requests = [Request(candidate, steps) for candidate in candidates]
    return [evaluation for group in evaluator.groups(requests) for evaluation in evaluator.evaluate(group)]


def adapters_of(module: FineTuneModule) -> dict[str, torch.Tensor]:
    """The masters, on the CPU."""
    return {name: value.cpu() for name, value in module.backbone.adapter_state().items()}
