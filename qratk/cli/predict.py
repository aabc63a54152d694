"""`qratk predict`: log-likelihoods of the rows of the data's prediction set, in a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from qratk.cli.application import QratkCLI, run
from qratk.run.atomic import write_atomically


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
        """Write all rows, in the order of the data."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        items = [row.item for row in data.scoring_rows(data.prediction_split)]
        lines = [
            {"row": row, "item": items[row], "log_likelihood": value, "tokens": tokens}
            for batch in predictions
            for row, value, tokens in zip(
                *(batch[k].tolist() for k in ("row", "log_likelihood", "tokens")), strict=True
            )
        ]
        text = "".join(json.dumps(line) + "\n" for line in sorted(lines, key=lambda line: line["row"]))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, text)
        print(f"predictions: {self.path}")


def predict(arguments: Sequence[str]) -> int:
    """Exit status of `qratk predict`."""
    return run(PredictCommand, arguments)
