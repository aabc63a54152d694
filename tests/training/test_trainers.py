"""Trainers of a search: what they leave behind for the next one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning import LightningModule
from tiny_runs import MIXED, Files, evaluated, opened

CPU = {"accelerator": "cpu", "devices": 1}
OTHER = "4:4 2:2 8:4"


@pytest.fixture(scope="module")
def files(model_dir: Path, data_files: dict[str, str]) -> Files:
    return Files(str(model_dir), data_files)


@pytest.mark.parametrize("cohort", [1, 2])
def test_a_search_leaves_the_model_on_its_device_after_training_scoring_and_testing(
    cohort: int, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def moved(module: Any) -> None:
        raise AssertionError(f"{type(module).__name__} was moved off its device")

    evaluator = opened(tmp_path, files, CPU, cohort=cohort)
    monkeypatch.setattr(LightningModule, "cpu", moved)
    found = evaluated(evaluator, 2, MIXED, OTHER)
    assert [evaluation.status for evaluation in found] == ["ok", "ok"]
    assert evaluator.prepare_test()
    assert "score" in evaluator.test(found[0])
    assert "cpu" not in vars(evaluator.parts.module)  # afterwards it can be moved again
