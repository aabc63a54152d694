"""`qratk fit`: fine-tunes one configuration and saves its adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qratk.cli.application import QratkCLI, run


class FitCommand(QratkCLI):
    """Lightning's fit, which ends with a PEFT adapter and its score."""

    command = "fit"

    def after_fit(self) -> None:
        """Save the adapter beside the logs, as PEFT wants it, and score it where there is validation data."""
        log_dir = self.trainer.log_dir  # a broadcast: every process must ask
        if log_dir and self.trainer.is_global_zero:
            folder = Path(log_dir) / "adapter"
            self.model.save_adapter(folder)
            print(f"adapter: {folder}")
        if self.datamodule.has("validation") and self.trainer.limit_val_batches != 0:
            self.trainer.validate(self.model, datamodule=self.datamodule)


def fit(arguments: Sequence[str]) -> int:
    """Exit status of `qratk fit`."""
    return run(FitCommand, arguments)
