"""Searches and fits with AdaLoRA: ranks move within the bytes, rungs continue to the bit, the file is plain LoRA."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from finetune_runs import MIXED, evaluated, opened, resumed_fit, same_tensors, score_of_fit
from safetensors.torch import load_file

from qratk.adapters.adalora import AdaLoraAdapters
from qratk.core import Candidate, Configuration, ConfigurationError, Evaluation, Request
from qratk.evaluators.finetune import FineTuneEvaluator
from qratk.training.module import FineTuneModule

ADALORA: dict[str, Any] = {"adapter": "adalora", "adalora": {"delta_t": 1, "tinit": 0.2, "tfinal": 0.2}}


def adapters_of(evaluator: FineTuneEvaluator) -> AdaLoraAdapters:
    adapters = evaluator.parts.module.backbone.adapters
    assert isinstance(adapters, AdaLoraAdapters)
    return adapters


@pytest.fixture(scope="module")
def straight(
    tmp_path_factory: pytest.TempPathFactory, model_dir: Path, data_files: dict[str, str]
) -> tuple[FineTuneEvaluator, Evaluation]:
    evaluator = opened(tmp_path_factory.mktemp("straight"), model_dir, data_files, **ADALORA)
    return evaluator, evaluated(evaluator, MIXED, 6)


def test_ranks_end_uneven_at_the_total_of_the_configuration(
    straight: tuple[FineTuneEvaluator, Evaluation],
) -> None:
    evaluator, measured = straight
    evaluator.parts.alone.train(MIXED, 6)
    adapters = adapters_of(evaluator)
    left = [adapters.rank(name) for name in adapters.banks]
    layers = zip(evaluator.parts.module.backbone.layers, MIXED.layers, strict=True)
    configured = [choice.rank for layer, choice in layers for _ in layer.modules]
    assert measured.ok
    assert sum(left) == sum(configured)
    assert left != configured
    assert len(set(left)) > 2
    assert sum(t.nbytes for t in adapters.stored_tensors().values()) <= measured.footprint.adapters


def test_continuing_from_rung_to_rung_is_bit_identical_to_not_stopping(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str], straight: tuple[FineTuneEvaluator, Evaluation]
) -> None:
    whole, expected = straight
    evaluator = opened(tmp_path, model_dir, data_files, **ADALORA)
    evaluated(evaluator, MIXED, 2)
    evaluated(evaluator, Configuration.uniform(4, 4, 3), 2)  # another candidate in between
    later = opened(tmp_path, model_dir, data_files, **ADALORA)  # another process
    torch.manual_seed(12345)
    evaluated(later, MIXED, 4)
    assert evaluated(later, MIXED, 6).outcomes == expected.outcomes
    assert expected.checkpoint is not None
    stored = Path(expected.checkpoint) / "adapter.safetensors"
    assert same_tensors(tmp_path / stored, whole.parts.context.run_dir / stored)


def test_the_allocators_state_is_what_makes_it_so(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str], straight: tuple[FineTuneEvaluator, Evaluation]
) -> None:
    evaluator = opened(tmp_path, model_dir, data_files, **ADALORA)
    measured, rungs = evaluated(evaluator, MIXED, 2), evaluator.parts.rungs
    _, state = rungs.latest(MIXED, 2)
    assert state is not None
    own = [name for name in state.optimizer if name.startswith("adalora/")]
    assert {name.split("/")[1] for name in own} == {"sensitivity", "uncertainty"}
    evaluator.discard(measured)
    less = {name: value for name, value in state.optimizer.items() if name not in own}
    rungs.save(MIXED, 2, replace(state, optimizer=less))
    assert evaluated(evaluator, MIXED, 6).outcomes != straight[1].outcomes


@pytest.mark.usefixtures("processor")
def test_a_fit_of_as_many_steps_has_the_score_of_the_search_and_so_has_the_file_in_plain_peft(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str], straight: tuple[FineTuneEvaluator, Evaluation]
) -> None:
    from peft import PeftModel

    from qratk.exporters.native import native_model

    score, module = score_of_fit(model_dir, data_files, **ADALORA)
    assert score == pytest.approx(straight[1].score, abs=0)
    module.save_adapter(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    adapters = module.backbone.adapters
    assert isinstance(adapters, AdaLoraAdapters)
    assert sum(tensor.nbytes for tensor in tensors.values()) == sum(
        t.nbytes for t in adapters.stored_tensors().values()
    )
    assert {len(t) for n, t in tensors.items() if "lora_A" in n} == {adapters.rank(n) for n in adapters.banks} - {0}
    plain = PeftModel.from_pretrained(native_model(module.backbone, MIXED), str(tmp_path / "adapter")).eval()
    batch = {"input_ids": torch.arange(3, 20)[None], "attention_mask": torch.ones(1, 17, dtype=torch.int64)}
    module.eval()
    with torch.no_grad(), module.backbone.stored_precision():
        torch.testing.assert_close(plain(**batch).logits, module(batch), rtol=0, atol=0)
    with torch.no_grad():
        assert not torch.equal(plain(**batch).logits, module(batch))  # the masters are no such thing


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("rslora", [False, True])
def test_merged_weights_are_those_of_the_stored_adapters(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str], rslora: bool
) -> None:
    from peft import PeftModel

    from qratk.exporters.dense import merged_model
    from qratk.exporters.native import native_model

    evaluator = opened(tmp_path, model_dir, data_files, rslora=rslora, **ADALORA)
    evaluated(evaluator, MIXED, 6)
    backbone = evaluator.parts.module.backbone
    backbone.save_adapter(tmp_path / "adapter", MIXED)
    plain = PeftModel.from_pretrained(native_model(backbone, MIXED), str(tmp_path / "adapter")).eval()
    merged = merged_model(backbone, dtype=torch.float32).eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_fit_resumed_from_a_checkpoint_equals_an_uninterrupted_one(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str], straight: tuple[FineTuneEvaluator, Evaluation]
) -> None:
    _, module = resumed_fit(tmp_path / "half.ckpt", model_dir, data_files, **ADALORA)
    assert module.last_outcomes == straight[1].outcomes


def test_the_allocator_sees_every_step_once(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qratk.adapters.matrices.singular import RankAllocator

    seen: list[int] = []
    monkeypatch.setattr(RankAllocator, "step", lambda self, step: seen.append(step))
    evaluator = opened(tmp_path, model_dir, data_files, accumulate=2, **ADALORA)
    for steps in (2, 4, 6):
        evaluated(evaluator, MIXED, steps)
    assert seen == [1, 2, 3, 4, 5, 6]


def test_candidates_are_trained_one_by_one_and_the_reason_is_said_once(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str]
) -> None:
    said: list[str] = []
    evaluator = opened(tmp_path, model_dir, data_files, cohort=4, context={"say": said.append}, **ADALORA)
    asked = [Request(Candidate(Configuration.uniform(b, 2, 3), "test"), 2) for b in (2, 4, 8)]
    assert [len(group) for group in evaluator.groups(asked)] == [1, 1, 1]
    list(evaluator.groups(asked))
    assert [text for text in said if "AdaLoRA" in text] == said
    assert len(said) == 1


def test_layers_without_an_adapter_stay_without_one(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str]
) -> None:
    evaluator = opened(tmp_path, model_dir, data_files, **{**ADALORA, "lora_dropout": 0.0})
    mixed = Configuration.from_text("4:0 4:2 4:4")
    measured = evaluated(evaluator, mixed, 6)
    adapters = adapters_of(evaluator)
    assert measured.ok
    assert all(adapters.rank(name) == 0 for name in adapters.banks if ".layers.0." in name)
    assert sum(adapters.rank(name) for name in adapters.banks) == 7 * (2 + 4)
    bare = evaluated(evaluator, Configuration.uniform(4, 0, 3), 2)
    assert bare.ok


def test_what_cannot_be_is_refused(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigurationError, match="adalora"):
        FineTuneModule(str(model_dir), adalora={"tinit": 0.1})
    with pytest.raises(ConfigurationError, match="'t_init'"):
        opened(tmp_path, model_dir, data_files, adapter="adalora", adalora={"t_init": 0.1})
    module = opened(tmp_path, model_dir, data_files, **ADALORA).parts.module
    monkeypatch.setattr(FineTuneModule, "trainer", SimpleNamespace(precision="16-mixed"))
    with pytest.raises(ConfigurationError, match="precision"):
        module._follow(torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]))
