"""`qratk predict`: log-likelihoods of the rows of the data's prediction set, in a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from qratk.cli.application import QratkCLI, run
from qratk.run.atomic import write_atomically

Line = dict[str, int | float]
"""One row of the file."""


class PredictCommand(QratkCLI):
    """Lightning's predict."""

    command = "predict"

    def before_predict(self) -> None:
        """Have the predictions written."""
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)
        self.trainer.callbacks.append(PredictionFile(folder))  # type: ignore[attr-defined]


class PredictionFile(BasePredictionWriter):
    """Writes `predictions.jsonl`: log-likelihood and tokens of every row, with the item that it belongs to."""

    def __init__(self, folder: Path) -> None:
        super().__init__("epoch")
        self.path = folder / "predictions.jsonl"

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Write all rows, in the order of the data; one process writes those of all, which share the batches out."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        items = [row.item for row in data.scoring_rows(data.prediction_split)]
        lines: list[Line] = [
            {"row": row, "item": items[row], "log_likelihood": value, "tokens": tokens}
            for batch in predictions
            for row, value, tokens in zip(
                *(batch[k].tolist() for k in ("row", "log_likelihood", "tokens")), strict=True
            )
        ]
        found = {line["row"]: line for part in _of_all_processes(lines) for line in part}
        if not trainer.is_global_zero:
            return
        text = "".join(json.dumps(found[row]) + "\n" for row in sorted(found))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, text)
        print(f"predictions: {self.path}")


def _of_all_processes(lines: list[Line]) -> list[list[Line]]:
    """What each process of the Trainer has."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [lines]
    every: list[list[Line]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(every, lines)
    return every


def predict(arguments: Sequence[str]) -> int:
    """Exit status of `qratk predict`."""
    return run(PredictCommand, arguments)
