"""Searches and fits with adapters that make up for quantisation, or whose inputs are pooled."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_runs import LADDER, MIXED, evaluated, in_groups, opened
from lightning import Trainer

from qratk.core import Candidate, Configuration, ConfigurationError, Evaluation, Request
from qratk.data.multiple_choice import MultipleChoiceData
from qratk.embedded.world import documents, make_world
from qratk.evaluators.finetune import FineTuneEvaluator
from qratk.training.module import FineTuneModule
from qratk.training.preparation import build_initial
from qratk.training.trainers import quiet_lightning

OTHERS = tuple(Configuration.from_text(text) for text in ("4:2*3", "8:4 2:4 2:2", "2:4*3"))
VARIANTS: dict[str, dict[str, Any]] = {
    "loftq twice": {"init": "loftq", "init_iterations": 2},
    "lq_lora": {"init": "lq_lora", "init_iterations": 2, "init_batches": 2, "init_batch_size": 2},
    "cloq": {"init": "cloq", "calibration_sequences": 4},
    "qa_lora": {"input_groups": 16},
    "qa_lora loftq": {"input_groups": 16, "init": "loftq"},
}


def started(run_dir: Path, model_dir: Path, data_files: dict[str, str], **options: Any) -> FineTuneEvaluator:
    return opened(run_dir, model_dir, data_files, **{"bank_dir": None, "lora_dropout": 0.0, **options})


def fitted(
    model_dir: Path, data_files: dict[str, str], configuration: Configuration, steps: int, **options: Any
) -> tuple[FineTuneModule, float]:
    module = FineTuneModule(
        str(model_dir), str(configuration), learning_rate=1e-2, **{"bank_dir": None, "schedule_steps": 6, **options}
    )
    files: dict[str, Any] = dict(data_files)
    data = MultipleChoiceData(**files, batch_size=4, score="log_likelihood")
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "num_sanity_val_steps": 0,
    }
    with quiet_lightning():
        trainer = Trainer(max_steps=steps, enable_model_summary=False, **quiet)
        trainer.fit(module, datamodule=data)
        metrics = trainer.validate(module, datamodule=data, verbose=False)[0]
    return module, float(metrics["validation/score"])


def climbed(evaluator: FineTuneEvaluator) -> list[Evaluation]:
    return [
        evaluation
        for steps in LADDER.steps[:2]
        for evaluation in in_groups(evaluator, [Request(Candidate(c, "test"), steps) for c in (MIXED, *OTHERS)])
    ]


@pytest.mark.parametrize("variant", ["loftq twice", "lq_lora", "cloq", "qa_lora loftq"])
def test_a_fit_and_a_search_continued_in_another_process_have_the_same_score(
    variant: str, tmp_path: Path, model_dir: Path, data_files: dict[str, str]
) -> None:
    options = VARIANTS[variant]
    evaluated(started(tmp_path, model_dir, data_files, **options), MIXED, 4)
    later = started(tmp_path, model_dir, data_files, **options)
    found = evaluated(later, MIXED, 6)
    module, score = fitted(model_dir, data_files, MIXED, 6, **options)
    assert found.score == score
    assert found.outcomes == module.last_outcomes


@pytest.mark.parametrize("variant", [pytest.param("loftq twice", marks=pytest.mark.slow), "qa_lora"])
def test_candidates_side_by_side_have_the_scores_of_one_after_another(
    variant: str, tmp_path: Path, model_dir: Path, data_files: dict[str, str]
) -> None:
    options = VARIANTS[variant]
    alone = climbed(started(tmp_path / "alone", model_dir, data_files, **options))
    together = climbed(started(tmp_path / "together", model_dir, data_files, cohort=4, **options))
    for expected, found in zip(alone, together, strict=True):
        assert found.ok
        assert found.configuration == expected.configuration
        assert found.score == pytest.approx(expected.score, rel=1e-5)
    assert len({round(e.score, 4) for e in together}) > 5


@pytest.mark.usefixtures("processor")
def test_what_a_search_found_is_exported_with_its_own_weights_and_loads_in_plain_peft(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str], tiny_batch: dict[str, Any]
) -> None:
    from peft import PeftModel

    from qratk.exporters.dense import merged_model
    from qratk.exporters.native import native_model
    from qratk.exporters.packed import load_quantized, save_quantized, stored_bytes

    evaluator = started(tmp_path, model_dir, data_files, init="loftq", init_iterations=2)
    evaluation = evaluated(evaluator, MIXED, 2)
    evaluator.test(evaluation)
    backbone = evaluator.parts.module.backbone
    backbone.save_adapter(tmp_path / "adapter", MIXED)
    save_quantized(backbone, MIXED, tmp_path / "base")
    loaded = load_quantized(tmp_path / "base")
    assert stored_bytes(tmp_path / "base") == evaluation.footprint.storage_bytes - evaluation.footprint.adapters
    for name, bank in backbone.banks.items():
        assert torch.equal(loaded.banks[name].weight.data, bank.weight.data)
    with torch.no_grad(), backbone.stored_precision():
        expected = backbone.model.eval()(**tiny_batch).logits
        merged = merged_model(backbone)(**tiny_batch).logits
        for base in (native_model(backbone, MIXED), native_model(loaded, MIXED)):
            plain = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
            assert torch.equal(plain(**tiny_batch).logits, expected)
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)
    loaded.activate(MIXED, seed=0)  # fresh adapters of the loaded base change nothing
    assert all(not value.any() for name, value in loaded.adapter_state().items() if name.endswith("lora_B.weight"))


class Documents:
    """Batches of text of the embedded model's world."""

    def __init__(self, tokenizer: Any, seed: int = 0) -> None:
        self.tokenizer, self.seed = tokenizer, seed

    def calibration_batches(self, count: int, size: int) -> list[dict[str, torch.Tensor]]:
        texts = list(islice(documents(make_world(), self.seed), count * size))
        rows = [torch.tensor(self.tokenizer(text)["input_ids"][:40]) for text in texts]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
        return [
            {"input_ids": labels.clamp(min=0), "attention_mask": (labels >= 0).long(), "labels": labels}
            for labels in torch.split(padded, size)
        ]


def test_the_embedded_model_at_two_bits_begins_nearer_to_its_full_precision() -> None:
    losses = {}
    for init in ("none", "default", "loftq", "lq_lora", "cloq"):
        begin: Any = "default" if init == "none" else init
        module = FineTuneModule("embedded", bank_dir=None, init=begin, init_batches=1)
        backbone = module.backbone
        backbone.build_bank([2])
        build_initial(backbone, module.options, [(2, 16)], lambda m=module: Documents(m.tokenizer))
        module.activate(Configuration.uniform(16 if init == "none" else 2, 16, len(backbone.layers)))
        (batch,) = Documents(module.tokenizer, seed=5).calibration_batches(1, 32)
        with torch.no_grad():
            losses[init] = float(module.eval().training_loss(batch))
    lost = losses["default"] - losses["none"]
    assert lost > 0.02
    for init in ("loftq", "lq_lora", "cloq"):
        assert losses[init] - losses["none"] < 0.8 * lost


def test_options_of_the_fisher_batches_are_checked() -> None:
    with pytest.raises(ConfigurationError, match="init_batches"):
        FineTuneModule("embedded", init="lq_lora", init_batches=0)
