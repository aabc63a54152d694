"""Micro-batches, replicas and cohorts have the gradient of one large batch, however long their answers are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from tiny_runs import QUIET, Files, make_module, opened

from qratk.core import Candidate, Configuration, Request
from qratk.data.instruction import InstructionData

UNEVEN = [
    {"instruction": f"Say {i}.", "input": "", "output": "y" if i % 2 else "the number is " + str(i) * 12}
    for i in range(16)
]


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
]


class Gradients(Callback):
    """Keeps the gradients of the first optimiser step, as they are clipped and applied."""

    def __init__(self) -> None:
        self.first: list[torch.Tensor] = []

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        trainer.optimizers[0].register_step_post_hook(self._keep)  # Lightning computes gradients within the step

    def _keep(self, optimizer: Any, *rest: Any) -> None:
        grads = [p.grad.clone() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.first = self.first or grads


@pytest.fixture(scope="module")
def files(model_dir: Path, data_files: dict[str, str]) -> Files:
    return Files(str(model_dir), data_files)


@pytest.fixture
def rows(tmp_path: Path) -> str:
    import json

    path = tmp_path / "uneven.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in UNEVEN))
    return str(path)


def gradients(files: Files, rows: str, *, batch_size: int, accumulate: int, **options: Any) -> torch.Tensor:
    """All gradients of the first step of a fit, flattened."""
    seen = Gradients()
    data = InstructionData(train=rows, validation_items=2, batch_size=batch_size, max_length=64)
    given = {**QUIET, "accelerator": "cpu", "devices": 1, "limit_val_batches": 0, "max_steps": 1, **options}
    Trainer(**given, accumulate_grad_batches=accumulate, callbacks=[seen]).fit(make_module(files), datamodule=data)
    return torch.cat([grad.flatten() for grad in seen.first])


def test_micro_batches_have_the_gradient_of_the_large_batch(files: Files, rows: str) -> None:
    large = gradients(files, rows, batch_size=4, accumulate=1)
    small = gradients(files, rows, batch_size=1, accumulate=4)
    assert torch.nn.functional.cosine_similarity(large, small, dim=0) > 0.999999
    torch.testing.assert_close(small, large, rtol=1e-4, atol=1e-6)


def test_clipping_sees_the_gradient_of_the_large_batch(files: Files, rows: str) -> None:
    clip = {"gradient_clip_val": 1e-3}
    large = gradients(files, rows, batch_size=4, accumulate=1, **clip)
    small = gradients(files, rows, batch_size=1, accumulate=4, **clip)
    assert float(small.norm()) == pytest.approx(1e-3, rel=1e-3)
    torch.testing.assert_close(small, large, rtol=1e-4, atol=1e-8)


def test_candidates_side_by_side_accumulate_as_alone(files: Files, tmp_path: Path) -> None:
    configurations = [Configuration.from_text("4:4*3"), Configuration.from_text("2:2 4:4 8:2")]
    requests = [Request(Candidate(c, "test"), 2) for c in configurations]
    scores = []
    for cohort in (1, 2):
        trainer = {**QUIET, "accelerator": "cpu", "devices": 1, "accumulate_grad_batches": 2}
        evaluator = opened(tmp_path / str(cohort), files, trainer, cohort=cohort)
        scores.append([evaluation.score for evaluation in evaluator.evaluate(requests)])
    assert scores[1] == pytest.approx(scores[0], abs=1e-4)
