"""What a worker builds of a search's settings, and that it measures what the search itself would."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import yaml

from qratk.__main__ import main
from qratk.cli.blueprint import SettingsBlueprint
from qratk.run.journal import read_journal

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.. is deprecated.*"),
]

SETTINGS = {
    "trainer": {"accelerator": "cpu", "gradient_clip_val": 0.7},
    "model": {"model": "embedded", "learning_rate": 0.005},
    "data": {
        "class_path": "EmbeddedData",
        "init_args": {"max_train_items": 32, "max_validation_items": 8, "max_test_items": 8, "batch_size": 4},
    },
    "search": {
        "evaluator": {
            "class_path": "finetune",
            "init_args": {"calibration_batches": 1, "calibration_batch_size": 2, "cohort": 2},
        },
        "searcher": {"class_path": "nsga2", "init_args": {"population": 4, "offspring": 3}},
        "refiner": "none", "bits": [2, 4], "ranks": [2], "like": [4, 2], "steps": [1, 2], "generations": 1,
        "high_fidelity_candidates": 1, "references": [[8, 2]],
    },
}  # fmt: skip


def test_equipment_is_what_the_settings_say_also_after_a_journey(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    equipment = pickle.loads(pickle.dumps(SettingsBlueprint(SETTINGS))).build()
    assert type(equipment.evaluator).__name__ == "FineTuneEvaluator"
    assert equipment.evaluator.cohort == 2
    assert equipment.module.options.learning_rate == 0.005
    assert equipment.datamodule.batch_size == 4
    trainer = equipment.trainer(max_steps=3, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    assert (trainer.max_steps, trainer.gradient_clip_val) == (3, 0.7)


@pytest.mark.slow
def test_fine_tuning_in_processes_gives_the_scores_of_one_after_another_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(SETTINGS))
    for executor in ("serial", "processes"):
        arguments = ["--config", str(path), "--run_dir", executor, "--search.executor", executor]
        assert main(["search", *arguments]) == 0
    serial, processes = (read_journal(tmp_path / name / "journal.sqlite") for name in ("serial", "processes"))

    def scores(records):
        return {(r.evaluation.configuration, r.evaluation.steps): r.evaluation.outcomes for r in records}

    assert scores(processes.records) == scores(serial.records)
    assert processes.decisions == serial.decisions
