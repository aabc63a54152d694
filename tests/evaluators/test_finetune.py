"""Evaluation by fine-tuning: exact continuation, failures as records, the same score as `fit`, kill and resume."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finetune_runs import (
    MIXED,
    evaluated,
    measured,
    opened,
    resumed_fit,
    same_tensors,
    score_of_fit,
    search,
    start,
)

from qratk.components import REGISTRIES
from qratk.core import Configuration, Evaluation, RunDirectoryError
from qratk.evaluators.finetune import FineTuneEvaluator
from qratk.training.module import FineTuneModule
from qratk.training.optimisation import learning_rate_factor


@pytest.fixture(scope="module")
def straight(
    tmp_path_factory: pytest.TempPathFactory, model_dir: Path, data_files: dict[str, str]
) -> tuple[FineTuneEvaluator, Evaluation]:
    evaluator = opened(tmp_path_factory.mktemp("straight"), model_dir, data_files)
    return evaluator, evaluated(evaluator, MIXED, 6)


def test_continuing_from_rung_to_rung_is_bit_identical_to_not_stopping(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str], straight: tuple[FineTuneEvaluator, Evaluation]
) -> None:
    evaluator = opened(tmp_path, model_dir, data_files)
    first = evaluated(evaluator, MIXED, 2)
    evaluated(evaluator, Configuration.uniform(4, 4, 3), 2)  # another candidate in between
    evaluated(evaluator, MIXED, 4)
    last = evaluated(evaluator, MIXED, 6)
    whole, expected = straight
    assert last.score == expected.score
    assert last.outcomes == expected.outcomes
    assert last.score != first.score
    assert expected.checkpoint is not None
    stored = Path(expected.checkpoint) / "adapter.safetensors"
    assert same_tensors(tmp_path / stored, whole.parts.context.run_dir / stored)


def test_another_process_continues_bit_identically(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str], straight: tuple[FineTuneEvaluator, Evaluation]
) -> None:
    evaluated(opened(tmp_path, model_dir, data_files), MIXED, 4)
    later = opened(tmp_path, model_dir, data_files)
    torch.manual_seed(12345)
    assert evaluated(later, MIXED, 6).outcomes == straight[1].outcomes


def test_a_fit_of_as_many_steps_has_the_score_of_the_search(
    model_dir: Path, data_files: dict[str, str], straight: tuple[FineTuneEvaluator, Evaluation]
) -> None:
    score, _ = score_of_fit(model_dir, data_files)
    assert score == pytest.approx(straight[1].score, abs=0)


def test_a_fit_resumed_from_a_checkpoint_equals_an_uninterrupted_one(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str], straight: tuple[FineTuneEvaluator, Evaluation]
) -> None:
    trainer, module = resumed_fit(tmp_path / "half.ckpt", model_dir, data_files)
    assert trainer.global_step == 6
    assert module.last_outcomes == straight[1].outcomes


def test_the_score_is_that_of_the_adapters_as_stored_in_16_bits(
    straight: tuple[FineTuneEvaluator, Evaluation],
) -> None:
    evaluator, expected = straight
    evaluator.parts.alone.train(MIXED, 6)  # puts the stored float32 masters in place
    for _, parameter in evaluator.parts.module.backbone.trainable_parameters():
        parameter.data = parameter.data.bfloat16().float()
    assert evaluator.parts.alone.scored().score == expected.score


def test_the_learning_rate_depends_on_the_step_alone() -> None:
    assert [learning_rate_factor(k, 10, 2, "linear") for k in (0, 1, 2, 6, 10)] == pytest.approx(
        [1 / 3, 2 / 3, 1.0, 0.5, 0.0]
    )
    assert learning_rate_factor(6, 10, 2, "cosine") == pytest.approx(0.5)
    assert learning_rate_factor(99, 10, 2, "cosine") == pytest.approx(0.0)
    assert learning_rate_factor(9, 10, 0, "constant") == 1.0


def test_a_loss_that_is_not_finite_is_recorded_and_the_search_goes_on(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str]
) -> None:
    evaluator = opened(tmp_path, model_dir, data_files, learning_rate=1e30)
    failed = evaluated(evaluator, MIXED, 6)
    assert not failed.ok
    assert "learning rate" in failed.reason
    assert failed.checkpoint is None
    assert not (tmp_path / "checkpoints").exists()


def test_running_out_of_memory_is_recorded(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = opened(tmp_path, model_dir, data_files)

    def exhausted(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(FineTuneModule, "training_step", exhausted)
    failed = evaluated(evaluator, MIXED, 2)
    assert (failed.status, failed.reason.split(":")[0]) == ("lost", "OutOfMemoryError")


def test_another_failure_is_not_mistaken_for_a_bad_candidate(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = opened(tmp_path, model_dir, data_files)

    def broken(*args: Any) -> None:
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(FineTuneModule, "training_step", broken)
    with pytest.raises(RuntimeError, match="a bug of ours"):
        evaluated(evaluator, MIXED, 2)


def test_a_damaged_checkpoint_is_said_and_its_steps_are_repeated(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str], straight: tuple[FineTuneEvaluator, Evaluation]
) -> None:
    said: list[str] = []
    evaluator = opened(tmp_path, model_dir, data_files, context={"say": said.append})
    stored = evaluated(evaluator, MIXED, 2).checkpoint
    assert stored is not None
    (tmp_path / stored / "optimizer.safetensors").write_bytes(b"cut off")
    assert evaluated(evaluator, MIXED, 6).outcomes == straight[1].outcomes
    assert len(said) == 1
    assert "damaged" in said[0]


def test_a_flipped_bit_in_a_finished_checkpoint_moves_no_test_score(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str]
) -> None:
    said: list[str] = []
    evaluator = opened(tmp_path, model_dir, data_files, context={"say": said.append})
    measured = evaluated(evaluator, MIXED, 2)
    before = evaluator.test(measured)
    assert measured.checkpoint is not None
    file = tmp_path / measured.checkpoint / "adapter.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 0x40  # a high bit of the last float's exponent
    file.write_bytes(content)
    assert evaluator.test(measured) == before
    assert "adapter.safetensors differs from its digest" in said[0]


def test_a_checkpoint_that_cannot_be_written_ends_in_an_error_that_says_what_to_do(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str]
) -> None:
    evaluator = opened(tmp_path, model_dir, data_files)
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(RunDirectoryError, match="run the same command"):
        evaluated(evaluator, MIXED, 2)


def test_test_scores_are_those_of_the_checkpoint_even_when_it_was_deleted(
    straight: tuple[FineTuneEvaluator, Evaluation],
) -> None:
    evaluator, expected = straight
    before = evaluator.test(expected)
    evaluator.discard(expected)
    assert not (evaluator.parts.context.run_dir / "checkpoints" / MIXED.digest).exists()
    assert evaluator.test(expected) == before


def test_the_fingerprint_tells_models_and_data_apart(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str], straight: tuple[FineTuneEvaluator, Evaluation]
) -> None:
    mine = straight[0].fingerprint()
    assert opened(tmp_path, model_dir, data_files).fingerprint() == mine
    less = opened(tmp_path, model_dir, {**data_files, "train": data_files["validation"], "validation": None})  # type: ignore[dict-item]
    assert less.fingerprint()["model"] == mine["model"]
    assert less.fingerprint()["data"] != mine["data"]
    other = opened(
        tmp_path, model_dir, data_files, quantizers={2: {"class_path": "hqq", "init_args": {"group_size": 32}}}
    )
    assert other.fingerprint()["model"] != mine["model"]


def test_importance_is_estimated_by_the_registered_estimators(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str]
) -> None:
    evaluator = opened(tmp_path, model_dir, data_files)
    for name in ("fisher_residual", "gradient_spectrum"):
        scores = evaluator.importance(REGISTRIES["estimators"].create(name), evaluator.space)
        assert scores.shape == (3,)
        assert (scores > 0).all()


def test_a_layer_that_its_quantiser_cannot_take_is_announced_once(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    model_dir: Path,
    data_files: dict[str, str],
    tiny_model: Callable[..., Any],
) -> None:
    odd = tmp_path_factory.mktemp("odd")
    tiny_model("llama", hidden=64, intermediate=17).save_pretrained(odd)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (odd / name).write_bytes((model_dir / name).read_bytes())
    said: list[str] = []
    quantizers = {2: {"class_path": "hqq", "init_args": {"group_size": 128}}}
    evaluator = opened(tmp_path, odd, data_files, quantizers=quantizers, context={"say": said.append})
    evaluated(evaluator, MIXED, 2)
    evaluated(evaluator, MIXED, 4)
    assert len(said) == 1
    assert "2 bits" in said[0]
    assert "more projections" in said[0]


@pytest.mark.parametrize(
    ("cohort", "kills"),
    [(2, (6,)), *(pytest.param(cohort, (3, 9), marks=pytest.mark.slow) for cohort in (1, 2))],
)
def test_a_search_killed_at_any_moment_and_started_again_ends_with_the_same_scores_to_the_bit(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str], cohort: int, kills: tuple[int, ...]
) -> None:
    search(tmp_path / "whole", model_dir, data_files, cohort)
    expected = measured(tmp_path / "whole")
    killed = 0
    for lines in kills:  # evaluations after which the process is killed, in the middle of the next
        process = start(tmp_path / "cut", model_dir, data_files, cohort)
        assert process.stdout is not None
        seen = 0
        for line in process.stdout:
            seen += "score" in line and line.startswith("[")
            if seen == lines:
                time.sleep(0.05)
                process.send_signal(signal.SIGKILL)
                break
        process.communicate(timeout=60)
        killed += process.returncode == -signal.SIGKILL
    assert killed == len(kills)
    assert kills[-1] <= len(measured(tmp_path / "cut")) < len(expected)
    search(tmp_path / "cut", model_dir, data_files, cohort)
    assert measured(tmp_path / "cut") == expected


def test_importances_measured_at_once_are_those_measured_apart(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str]
) -> None:
    evaluator = opened(tmp_path, model_dir, data_files)
    asked = [REGISTRIES["estimators"].create(name) for name in ("fisher_residual", "gradient_spectrum", "uniform")]
    apart = [evaluator.importance(estimator, evaluator.space) for estimator in asked]
    for one, other in zip(apart, evaluator.importances(asked, evaluator.space), strict=True):
        np.testing.assert_array_equal(one, other)


def test_importance_by_rung_is_that_of_estimators_that_know_it(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str]
) -> None:
    evaluator = opened(tmp_path, model_dir, data_files)
    create = REGISTRIES["estimators"].create
    space = evaluator.space
    costs = evaluator.importance_by_rung(create("autoquantize"), space, "bits")
    assert costs.shape == (3, len(space.bits))
    assert (np.diff(costs, axis=1) < 0).all()
    np.testing.assert_allclose(costs[:, 0], evaluator.importance(create("autoquantize"), space))
    gains = evaluator.importance_by_rung(create("explained_variance"), space, "rank")
    assert gains.shape == (3, len(space.ranks))
    assert (np.diff(gains, axis=1) > 0).all()
    assert evaluator.importance_by_rung(create("fisher_residual"), space, "bits") is None
