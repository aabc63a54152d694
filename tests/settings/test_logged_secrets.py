"""What loggers and checkpoints get of module and data holds no secret; the objects themselves keep it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule
from lightning.pytorch.loggers import CSVLogger

from qratk.adapters.lora import Lora
from qratk.data.choices import ChoiceData
from qratk.training.module import FineTuneModule


class GuardedData(ChoiceData):
    """Rows behind a password."""

    def __init__(self, password: int, headers: dict[str, str], note: str) -> None:
        super().__init__("rows.jsonl")
        self.save_hyperparameters()


@pytest.fixture
def data() -> GuardedData:
    return GuardedData(8675309, {"Authorization": "Bearer 8675309"}, "kept")


def test_hyper_parameters_in_the_files_of_a_logger_hold_no_secret(data: GuardedData, tmp_path: Path) -> None:
    module = FineTuneModule("https://me:8675309@host/x")
    logger = CSVLogger(tmp_path)
    logger.log_hyperparams({**module.hparams_initial, **data.hparams_initial})
    logger.save()
    text = (Path(logger.log_dir) / "hparams.yaml").read_text(encoding="utf-8")
    assert "8675309" not in text
    saved = yaml.safe_load(text)
    assert (saved["model"], saved["headers"], saved["note"]) == ("https://host/x", {}, "kept")
    assert data.hparams.password == 8675309


def test_checkpoint_holds_no_secret_of_data_and_model(data: GuardedData, monkeypatch: pytest.MonkeyPatch) -> None:
    module = FineTuneModule("https://me:8675309@host/x?token=8675309", betas=(0.5, 0.9))
    monkeypatch.setattr(
        module,
        "_backbone",
        SimpleNamespace(adapter_state=dict, adapters=SimpleNamespace(method=Lora()), compute_dtype=torch.float32),
    )
    keys = FineTuneModule.CHECKPOINT_HYPER_PARAMS_KEY, LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY
    checkpoint: dict[str, Any] = dict(zip(keys, (dict(module.hparams), dict(data.hparams)), strict=True))
    module.on_save_checkpoint(checkpoint)
    assert "8675309" not in str({key: checkpoint[key] for key in keys})
    assert checkpoint[keys[0]]["model"] == "https://host/x"
    assert FineTuneModule(**checkpoint[keys[0]]).options.betas == [0.5, 0.9]
    assert checkpoint[keys[1]] == {"headers": {}, "note": "kept"}
    assert "8675309" in module.options.model
