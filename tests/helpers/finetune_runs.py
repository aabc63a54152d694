"""Evaluators over a tiny model, and searches in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import Trainer
from safetensors.torch import load_file

from qratk.components import REGISTRIES
from qratk.core import Candidate, Configuration, Evaluation, FidelityLadder, Request, SearchSpace
from qratk.core.result import SearchResult
from qratk.data.multiple_choice import MultipleChoiceData
from qratk.evaluators.base import EvaluationContext, Evaluator
from qratk.evaluators.finetune import FineTuneEvaluator
from qratk.loop import SearchLoop
from qratk.reporters.terminal import TerminalReporter
from qratk.run.journal import Journal
from qratk.training.module import FineTuneModule
from qratk.training.trainers import quiet_lightning

LADDER = FidelityLadder((2, 4, 6))
MIXED = Configuration.from_text("2:2 4:4 8:2")


def opened(
    run_dir: Path,
    model_dir: Path,
    data_files: dict[str, str],
    *,
    cohort: int | Literal["auto"] = 1,
    clip: float | None = None,
    accumulate: int = 1,
    context: dict[str, Any] | None = None,
    **options: Any,
) -> FineTuneEvaluator:
    """An evaluator that is open; `context` are further fields of its context."""
    module = FineTuneModule(str(model_dir), **{"learning_rate": 1e-2, "lora_dropout": 0.2, **options})
    data = MultipleChoiceData(**data_files, batch_size=4, score="log_likelihood")
    evaluator = FineTuneEvaluator(calibration_batches=1, calibration_batch_size=2, cohort=cohort)
    trainer = partial(Trainer, gradient_clip_val=clip, accumulate_grad_batches=accumulate)
    evaluator.open(EvaluationContext(run_dir, LADDER, 0, module, data, trainer, **(context or {})))
    names = tuple(shape.name for shape in evaluator.shapes)
    evaluator.memory_model(SearchSpace((2, 4, 8), (2, 4), names))
    return evaluator


def evaluated(evaluator: Evaluator, configuration: Configuration, steps: int) -> Evaluation:
    return evaluator.evaluate([Request(Candidate(configuration, "test"), steps)])[0]


def in_groups(evaluator: Evaluator, requests: Sequence[Request]) -> list[Evaluation]:
    """Evaluations of requests, group by group as a search has them."""
    return [evaluation for group in evaluator.groups(requests) for evaluation in evaluator.evaluate(group)]


def fitted(
    model_dir: Path, data_files: dict[str, str], steps: int = 6, *, ckpt_path: Path | None = None, **options: Any
) -> tuple[Trainer, FineTuneModule, MultipleChoiceData]:
    """A module after so many steps of `fit` on the mixed configuration, with its trainer and data."""
    module = FineTuneModule(str(model_dir), str(MIXED), **{"learning_rate": 1e-2, "lora_dropout": 0.2, **options})
    data = MultipleChoiceData(**data_files, batch_size=4, score="log_likelihood")
    trainer = Trainer(
        max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return trainer, module, data


def score_of_fit(model_dir: Path, data_files: dict[str, str], **options: Any) -> tuple[float, FineTuneModule]:
    """Validation score after six steps of `fit`, and the module."""
    with quiet_lightning():
        trainer, module, data = fitted(model_dir, data_files, **options)
        return trainer.validate(module, datamodule=data, verbose=False)[0]["validation/score"], module


def resumed_fit(
    checkpoint: Path, model_dir: Path, data_files: dict[str, str], **options: Any
) -> tuple[Trainer, FineTuneModule]:
    """A module validated after six steps of `fit`, the last three by another trainer from a checkpoint."""
    options["schedule_steps"] = 6
    with quiet_lightning():
        fitted(model_dir, data_files, 3, **options)[0].save_checkpoint(checkpoint)
        torch.manual_seed(99)
        trainer, module, data = fitted(model_dir, data_files, ckpt_path=checkpoint, **options)
        trainer.validate(module, datamodule=data, verbose=False)
    return trainer, module


def same_tensors(a: Path, b: Path) -> bool:
    left, right = load_file(a), load_file(b)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def search(
    run_dir: Path,
    model_dir: Path,
    data_files: dict[str, str],
    cohort: int,
    evaluator: type[FineTuneEvaluator] = FineTuneEvaluator,
    **options: Any,
) -> SearchResult:
    """A whole search of two generations and a refinement, told line by line; where there is one, it goes on."""
    make: Any = lambda kind, name, **options: REGISTRIES[kind].create(name, **options)  # noqa: E731
    loop = SearchLoop(
        evaluator=evaluator(cohort=cohort),
        searcher=make("searchers", "nsga2", offspring=3),
        refiner=make("refiners", "trust_region", max_evaluations=2),
        surrogate=make("surrogates", "huber"),
        mutations=[make("mutations", "sensitivity"), make("mutations", "coupled")],
        repair=make("repairs", "greedy"),
        bits_importance=make("estimators", "fisher_residual"),
        rank_importance=make("estimators", "gradient_spectrum"),
        bits=[2, 4],
        ranks=[2, 4],
        like=[4, 2],
        steps=[1, 2],
        generations=2,
        high_fidelity_candidates=1,
        **options,
    )
    module = FineTuneModule(str(model_dir), learning_rate=1e-2, lora_dropout=0.1)
    data = MultipleChoiceData(**data_files, batch_size=4, score="log_likelihood")
    with quiet_lightning():
        return loop.run(
            run_dir=run_dir, reporter=TerminalReporter(plain=True), config={}, module=module, datamodule=data
        )


def start(run_dir: Path, model_dir: Path, data_files: dict[str, str], cohort: int) -> subprocess.Popen[str]:
    """The same search in a process of its own, to the bit."""
    call = f"search({run_dir!r}, {model_dir!r}, {data_files!r}, {cohort})"
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", f"from pathlib import *; from finetune_runs import search; {call}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).parent,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )


def measured(run_dir: Path) -> list[tuple[Any, ...]]:
    with Journal(run_dir) as journal:
        return [
            (str(e.configuration), e.steps, e.score, e.outcomes, r.candidate.origin)
            for r in journal.records
            for e in [r.evaluation]
        ]
