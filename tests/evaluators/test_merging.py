"""Adapters of several trainings averaged: the mean of their updates, cut to the ranks, scored, tested and saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_runs import MIXED, evaluated, opened
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qratk.core import Candidate, Configuration, Member, Request
from qratk.evaluators.finetune import FineTuneEvaluator

OTHER = Configuration.from_text("4:2 4:4 8:2 | alpha_over_rank=1")
CUT = {"adapter": {"class_path": "cut", "init_args": {"width": 6, "batches": 1}}}


def deltas(evaluator: FineTuneEvaluator) -> dict[str, torch.Tensor]:
    backbone = evaluator.parts.module.backbone
    return {name: backbone.adapters.delta(name).clone() for name in backbone.banks}


def trained(evaluator: FineTuneEvaluator, configuration: Configuration, replicate: int = 0) -> dict[str, torch.Tensor]:
    (found,) = evaluator.evaluate([Request(Candidate(configuration, "test"), 6, replicate)])
    assert found.ok
    return deltas(evaluator)


@pytest.mark.parametrize("options", [{}, CUT], ids=["lora", "cut"])
def test_a_mean_adds_the_mean_of_what_its_members_add(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str], options: dict[str, Any]
) -> None:
    evaluator = opened(tmp_path, model_dir, data_files, **options)
    alone = evaluated(evaluator, MIXED, 6)
    members = [Member(MIXED), Member(MIXED, 1), Member(OTHER)]
    parts = [trained(evaluator, m.configuration, m.replicate) for m in members]
    expected = {name: sum(part[name] for part in parts) / 3 for name in parts[0]}
    merged = evaluator.merged(alone, members)
    assert merged.ok
    assert merged.merged == tuple(members)
    assert merged.footprint == alone.footprint
    assert merged.outcomes != alone.outcomes
    found, wide = deltas(evaluator), bool(options)
    for name, update in found.items():
        rank = 6 if wide else int(torch.linalg.matrix_rank(update))
        left, values, right = torch.linalg.svd(expected[name])
        best = left[:, :rank] * values[:rank] @ right[:rank]
        assert torch.allclose(update, best, atol=1e-5 * float(values[0]) + 1e-7)
    assert evaluator.merged(alone, members).outcomes == merged.outcomes


def test_a_mean_of_one_training_is_that_training(tmp_path: Path, model_dir: Path, data_files: dict[str, str]) -> None:
    evaluator = opened(tmp_path, model_dir, data_files)
    alone = evaluated(evaluator, MIXED, 6)
    merged = evaluator.merged(alone, [alone.member])
    assert merged.score == pytest.approx(alone.score, abs=2e-3)  # other factors of one product, rounded to 16 bits


@pytest.mark.parametrize("options", [{}, CUT], ids=["lora", "cut"])
def test_the_mean_is_tested_and_saved_as_it_was_scored(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str], options: dict[str, Any]
) -> None:
    evaluator = opened(tmp_path / "run", model_dir, data_files, **options)
    alone = evaluated(evaluator, MIXED, 6)
    evaluated(evaluator, OTHER, 6)
    merged = evaluator.merged(alone, [Member(MIXED), Member(OTHER)])
    evaluated(evaluator, MIXED, 6)  # the module is elsewhere in between
    evaluator.prepare_test()
    assert evaluator.test(merged) != evaluator.test(alone)
    assert evaluator.save_adapter(merged, tmp_path / "mean")
    assert evaluator.save_adapter(alone, tmp_path / "alone")
    mean, single = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("mean", "alone"))
    assert {key: value.shape for key, value in mean.items()} == {key: value.shape for key, value in single.items()}
    assert sum(t.numel() * t.element_size() for t in mean.values()) == merged.footprint.adapters
    again = opened(tmp_path / "run", model_dir, data_files, **options)
    assert again.test(merged) == evaluator.test(merged)  # from the members' checkpoints alone
    served = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), tmp_path / "mean")
    loaded = get_peft_model_state_dict(served)
    assert loaded.keys() == mean.keys()
    assert all(torch.equal(loaded[name].float(), mean[name].float()) for name in mean)


def test_adapters_that_cannot_be_averaged_say_so(tmp_path: Path, model_dir: Path, data_files: dict[str, str]) -> None:
    assert not opened(tmp_path, model_dir, data_files, adapter="dora").merges
    assert opened(tmp_path, model_dir, data_files).merges


def test_a_member_that_is_gone_is_left_out_of_what_is_tried_and_trained_again_for_what_was_chosen(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str]
) -> None:
    evaluator = opened(tmp_path, model_dir, data_files)
    alone, other = evaluated(evaluator, MIXED, 6), evaluated(evaluator, OTHER, 6)
    merged = evaluator.merged(alone, [Member(MIXED), Member(OTHER)])
    evaluator.prepare_test()
    scores = evaluator.test(merged)
    evaluator.discard(other)
    gone = evaluator.merged(alone, [Member(MIXED), Member(OTHER)])
    assert not gone.ok
    assert gone.reason == "the checkpoint of a training was deleted"
    assert evaluator.test(merged) == scores


def test_a_seed_of_a_configuration_is_that_of_a_module_with_it(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str]
) -> None:
    plain = opened(tmp_path / "plain", model_dir, data_files)
    (fresh,) = plain.evaluate([Request(Candidate(MIXED, "test"), 6, 2)])
    own = opened(tmp_path / "own", model_dir, data_files, cohort=4)
    seeded = [MIXED.with_shared({"replicate": number}) for number in (0, 2)]
    requests = [Request(Candidate(c, "test"), 6) for c in (*seeded, MIXED)]
    groups = list(own.groups(requests))
    assert [len(group) for group in groups] == [1, 1, 1]  # other batches
    first, second, given = (evaluation for group in groups for evaluation in own.evaluate(group))
    assert second.outcomes == fresh.outcomes
    assert first.outcomes == given.outcomes != second.outcomes
    (another,) = own.evaluate([Request(Candidate(seeded[1], "test"), 6, 2)])
    assert another.outcomes not in (second.outcomes, first.outcomes)
