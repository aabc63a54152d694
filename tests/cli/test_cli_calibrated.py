"""A search with a calibrated quantiser, a fit of its best, and the scores of both."""

from __future__ import annotations

import json
import logging

import pytest
import yaml

from qratk.__main__ import main

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    # Lightning and torch disagree about the name of a leaf; neither is ours.
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.. is deprecated.*"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),  # a checkpoint is tested elsewhere than trained
]

CONFIG = {
    "trainer": {"accelerator": "cpu"},
    "model": {
        "model": "embedded", "learning_rate": 0.005, "bank_dir": None, "calibration_sequences": 8,
        "quantizers": {2: {"class_path": "awq", "init_args": {"group_size": 32}}, 4: "gptq"},
    },
    "data": {
        "class_path": "EmbeddedData",
        "init_args": {"max_train_items": 16, "max_validation_items": 4, "max_test_items": 4, "batch_size": 4},
    },
    "search": {
        "evaluator": {
            "class_path": "finetune", "init_args": {"calibration_batches": 1, "calibration_batch_size": 2},
        },
        "bits_importance": "activation_error", "rank_importance": "gradient_norm",
        "searcher": {"class_path": "nsga2", "init_args": {"population": 2, "offspring": 1}},
        "refiner": "none", "bits": [2, 4], "ranks": [2], "like": [4, 2], "steps": [1, 2], "generations": 1,
        "high_fidelity_candidates": 1,
    },
}  # fmt: skip


def test_a_fit_of_the_best_scores_as_the_search_did(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    levels = {name: logging.getLogger(name).level for name in ("lightning.pytorch", "lightning.fabric")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    assert main(["search", "--config", "config.yaml", "--run_dir=run"]) == 0
    best = json.loads((tmp_path / "run" / "result.json").read_text())["best"]
    assert main(["fit", "--config", "run/best.yaml", "--trainer.default_root_dir", str(tmp_path / "fit")]) == 0
    (checkpoint,) = (tmp_path / "fit").rglob("*.ckpt")
    capsys.readouterr()
    assert main(["validate", "--config", "run/best.yaml", "--ckpt_path", str(checkpoint)]) == 0
    assert f"{best['score']:.10f}"[:8] in capsys.readouterr().out

    # Other calibration sequences are another search.
    assert main(["search", "--config", "config.yaml", "--run_dir=run", "--model.calibration_sequences=9"]) == 1
    assert "calibration_sequences" in capsys.readouterr().err
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
