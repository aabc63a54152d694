"""What a bank cannot do as asked is told by a search and by a fit alike."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from finetune_runs import evaluated, opened, score_of_fit

from qratk.core import Configuration

GPTQ: dict[str, Any] = {"quantizers": {4: {"class_path": "gptq", "init_args": {"group_size": 48}}}}


def test_fallbacks_are_told_by_a_fit_as_by_a_search(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    said: list[str] = []
    evaluator = opened(tmp_path, model_dir, data_files, context={"say": said.append}, **GPTQ)
    evaluated(evaluator, Configuration.uniform(4, 2, 3), 2)
    told = [text for text in said if "instead of" in text]
    assert len(told) >= 1
    with caplog.at_level(logging.WARNING, logger="qratk"):
        score_of_fit(model_dir, data_files, **GPTQ)
    assert any(record.getMessage() in told for record in caplog.records)
