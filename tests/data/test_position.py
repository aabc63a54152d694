"""The place in the data: a function of the batches trained on, however a Trainer cuts them into epochs and resumes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from qratk.core import DataError
from qratk.data import StepSampler, TextData

Write = Callable[[str, list[Any]], str]

BATCH = 4
WORDS = ["red", "green", "blue", "one", "two", "three", "four", "five", "six", "seven", "yes", "no", "maybe", "dog"]
HELD_OUT = {"validation": "lazy dog", "test": "bright cold day"}


class Seen(LightningModule):
    """Remembers the batches of each optimiser step."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.tokenizer = tokenizer
        self.seen: list[list[list[int]]] = []

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        self.seen.append(batch["input_ids"].tolist())
        return self.weight

    def validation_step(self, batch: Any, _: int) -> None:
        """Nothing."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def make(write: Write, *, batch_size: int = BATCH) -> TextData:
    rows = [{"text": f"{WORDS[k % 14]} fox {WORDS[k // 14]} {k}"} for k in range(22)]  # 6 batches, the last short
    files = {name: write(f"{name}.jsonl", [{"text": text}]) for name, text in HELD_OUT.items()}
    return TextData(write("train.jsonl", rows), **files, packing=False, batch_size=batch_size)


def fit(data: Any, tokenizer: Any, *callbacks: Any, resume: Path | None = None, **options: Any) -> list[Any]:
    """The batches seen."""
    module = Seen(tokenizer)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=bool(callbacks), callbacks=list(callbacks),
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, **options,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning advises on workers, folders and intervals of logging
        warnings.filterwarnings("error", message=".*not resumable")
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return module.seen


def expected(data: Any, count: int) -> list[Any]:
    """The first batches of the run's one sequence."""
    rows = data.training_rows()
    sampler = StepSampler(len(rows), BATCH, data.seed)
    return [data.collate([rows[i] for i in sampler.batch(k)])["input_ids"].tolist() for k in range(count)]


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"max_steps": 8}, 8),
        ({"max_steps": 8, "limit_train_batches": 2}, 8),
        ({"max_epochs": 3}, 18),
        ({"max_epochs": 4, "limit_train_batches": 2}, 8),
        ({"max_epochs": 2, "max_steps": 100}, 12),
        ({"max_epochs": 20, "max_steps": 8}, 8),
        ({"max_steps": 3, "accumulate_grad_batches": 2, "limit_train_batches": 3}, 5),
    ],
    ids=str,
)
def test_a_trainer_goes_on_through_the_data(write: Write, tokenizer: Any, options: Any, count: int) -> None:
    data = make(write)
    seen = fit(data, tokenizer, **options)
    assert len(seen) == count
    assert seen == expected(data, count)


@pytest.mark.parametrize(
    ("first", "options"),
    [
        ({"max_epochs": 2}, {"max_epochs": 2}),
        ({"max_steps": 12}, {"max_steps": 12}),
        ({"max_steps": 12, "limit_train_batches": 5}, {"max_steps": 12, "limit_train_batches": 5}),
        ({"max_epochs": 2}, {"max_steps": 12}),
    ],
    ids=str,
)
@pytest.mark.parametrize("step", [1, 4, 6, 7, 10, 11])
def test_a_checkpoint_is_continued_with_the_batches_never_seen(
    write: Write, tokenizer: Any, tmp_path: Path, first: Any, options: Any, step: int
) -> None:
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    data = make(write)
    whole = fit(data, tokenizer, keep, **first)
    assert whole == expected(data, 12)
    rest = fit(make(write), tokenizer, resume=tmp_path / f"step={step}.ckpt", **options)
    assert rest == whole[step:]


def test_workers_do_not_run_ahead_of_the_place(write: Write, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    data = make(write)
    data._batches = type(data._batches)(BATCH, BATCH, data.seed, 2, True)
    assert fit(data, tokenizer, max_steps=7, limit_train_batches=3) == expected(data, 7)


def test_a_checkpoint_of_other_batches_is_refused(write: Write, tokenizer: Any, tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(make(write), tokenizer, keep, max_steps=2)
    with pytest.raises(DataError, match="batch_size 4 instead of 2"):
        fit(make(write, batch_size=2), tokenizer, resume=tmp_path / "step=1.ckpt", max_steps=3)
