"""A search computes in the type that it began with, wherever it goes on; a fit says when it does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_runs import fitted, opened

from qratk.backbone import loading
from qratk.training.trainers import quiet_lightning


@pytest.fixture
def halved(tmp_path_factory: pytest.TempPathFactory, model_dir: Path, tiny_model: Callable[..., Any]) -> Path:
    """The tiny model as a checkpoint in bfloat16."""
    folder = tmp_path_factory.mktemp("halved")
    tiny_model("llama").to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((model_dir / name).read_bytes())
    return folder


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Makes this a machine without CUDA whose CPU multiplies bfloat16, or not."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return lambda able: monkeypatch.setattr(loading, "multiplies_bfloat16", lambda: able)


class Decisions(dict[str, Any]):
    """What a journal keeps between two sessions of a search."""

    @property
    def context(self) -> dict[str, Any]:
        """The fields of a context that reach it."""
        return {"recorded": self.get, "decided": lambda key, decide: self.setdefault(key, decide())}


def test_a_resumed_search_keeps_its_type_on_another_processor(
    tmp_path: Path, halved: Path, data_files: dict[str, str], processor: Callable[[bool], None]
) -> None:
    processor(True)
    decisions = Decisions()
    begun = opened(tmp_path, halved, data_files, context=decisions.context)
    assert begun.parts.module.backbone.compute_dtype == torch.bfloat16
    assert decisions == {"compute_dtype": "bfloat16"}
    processor(False)
    resumed = opened(tmp_path, halved, data_files, context=decisions.context)
    assert resumed.parts.module.backbone.compute_dtype == torch.bfloat16
    assert resumed.fingerprint() == begun.fingerprint()
    assert opened(tmp_path, halved, data_files).fingerprint() != begun.fingerprint()


def test_a_search_from_before_the_type_was_recorded_goes_on_in_float32(
    tmp_path: Path, halved: Path, data_files: dict[str, str], processor: Callable[[bool], None]
) -> None:
    processor(False)
    before = opened(tmp_path, halved, data_files)
    processor(True)
    decisions = Decisions(importance={"bits": [1.0], "rank": [1.0]})
    resumed = opened(tmp_path, halved, data_files, context=decisions.context)
    assert resumed.fingerprint() == before.fingerprint()
    assert "compute_dtype" not in decisions  # on the machine that it was begun on, it may have been another


def test_a_type_that_was_asked_for_is_no_decision(
    tmp_path: Path, halved: Path, data_files: dict[str, str], processor: Callable[[bool], None]
) -> None:
    processor(True)
    decisions = Decisions()
    evaluator = opened(tmp_path, halved, data_files, compute_dtype="float32", context=decisions.context)
    assert evaluator.parts.module.backbone.compute_dtype == torch.float32
    assert not decisions


def test_a_fit_that_goes_on_in_another_type_says_so(
    tmp_path: Path, halved: Path, data_files: dict[str, str], processor: Callable[[bool], None],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    checkpoint = tmp_path / "half.ckpt"
    processor(False)
    with quiet_lightning(), caplog.at_level("INFO"):
        fitted(halved, data_files, 1, schedule_steps=2)[0].save_checkpoint(checkpoint)
        fitted(halved, data_files, 2, schedule_steps=2, ckpt_path=checkpoint)
        assert "goes on in" not in caplog.text
        processor(True)
        fitted(halved, data_files, 2, schedule_steps=2, ckpt_path=checkpoint)
    assert "was trained in float32 and goes on in bfloat16; give --model.compute_dtype=float32" in caplog.text
