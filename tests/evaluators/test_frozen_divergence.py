"""The proxy of frozen weights: scipy's divergence, one score for equal bits, no trace of it in later training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finetune_runs import LADDER, MIXED, evaluated, in_groups, opened, score_of_fit
from lightning import Trainer
from scipy.spatial.distance import jensenshannon

from qratk.core import Candidate, Configuration, ConfigurationError, Evaluation, FidelityLadder, Request, SearchSpace
from qratk.core.shared import SharedLadder
from qratk.data.multiple_choice import MultipleChoiceData
from qratk.evaluators.base import EvaluationContext, evaluators
from qratk.evaluators.frozen_divergence import FrozenDivergenceEvaluator
from qratk.training.divergence import FrozenDivergence, chosen_positions, jensen_shannon
from qratk.training.module import FineTuneModule

OTHER_RANKS = Configuration.of(MIXED.bits, (4, 4, 4))


def proxied(
    run_dir: Path,
    model_dir: Path,
    data_files: dict[str, str],
    *,
    ladder: FidelityLadder = LADDER,
    model: dict[str, Any] | None = None,
    context: dict[str, Any] | None = None,
    **options: Any,
) -> FrozenDivergenceEvaluator:
    module = FineTuneModule(str(model_dir), **{"learning_rate": 1e-2, "lora_dropout": 0.2, **(model or {})})
    data = MultipleChoiceData(**data_files, batch_size=4, score="log_likelihood")
    given = {"calibration_batches": 3, "calibration_batch_size": 4, "cohort": 1, **options}
    evaluator = FrozenDivergenceEvaluator(**given)
    evaluator.open(EvaluationContext(run_dir, ladder, 0, module, data, Trainer, **(context or {})))
    evaluator.memory_model(SearchSpace((2, 4, 8), (2, 4), tuple(shape.name for shape in evaluator.shapes)))
    return evaluator


def frozen(evaluator: FrozenDivergenceEvaluator) -> FrozenDivergence:
    """What its lowest rung is measured with."""
    assert evaluator._frozen is not None
    return evaluator._frozen


def requests(steps: int, *configurations: Configuration) -> list[Request]:
    return [Request(Candidate(configuration, "test"), steps) for configuration in configurations]


@pytest.fixture(scope="module")
def proxy(
    tmp_path_factory: pytest.TempPathFactory, model_dir: Path, data_files: dict[str, str]
) -> tuple[FrozenDivergenceEvaluator, Evaluation]:
    evaluator = proxied(tmp_path_factory.mktemp("proxy"), model_dir, data_files)
    return evaluator, evaluated(evaluator, MIXED, 2)


def test_divergence_is_the_square_of_scipys_distance() -> None:
    p, q = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    expected = jensenshannon(p.exp().double().numpy(), q.exp().double().numpy(), axis=1) ** 2
    np.testing.assert_allclose(jensen_shannon(p, q).numpy(), expected, rtol=1e-4)
    np.testing.assert_allclose(jensen_shannon(q, p).numpy(), expected, rtol=1e-4)


def test_divergence_is_zero_of_equals_and_ln_2_of_what_has_nothing_in_common() -> None:
    p = torch.tensor([[0.0, -torch.inf], [0.5, 0.5]]).log_softmax(1)
    p[0] = torch.tensor([0.0, -torch.inf])
    assert jensen_shannon(p, p).tolist() == [0.0, 0.0]
    q = torch.tensor([[-torch.inf, 0.0]])
    assert jensen_shannon(p[:1], q).item() == pytest.approx(math.log(2.0))


def full_and_frozen(
    evaluator: FrozenDivergenceEvaluator, model_dir: Path, configuration: Configuration
) -> list[list[float]]:
    """Divergences of each sequence at its labelled positions, from whole logits of plain Hugging Face models."""
    from transformers import AutoModelForCausalLM

    from qratk.exporters.dense import merged_model

    full = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    parts = evaluator._finetune.parts
    parts.module.activate(Configuration.of(configuration.bits, [0] * len(configuration)))
    quantised = merged_model(parts.module.backbone, dtype=torch.float32).eval()
    found = []
    for batch in parts.data.calibration_batches(3, 4):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            p, q = (model(**inputs).logits.double().softmax(-1).numpy() for model in (full, quantised))
        for row, labels in enumerate(batch["labels"].tolist()):
            at = [t - 1 for t in range(1, len(labels)) if labels[t] != -100]
            found.append([float(jensenshannon(p[row, t], q[row, t]) ** 2) for t in at])
    return found


def test_score_is_minus_the_mean_over_the_labelled_positions(
    proxy: tuple[FrozenDivergenceEvaluator, Evaluation], model_dir: Path
) -> None:
    evaluator, measured = proxy
    found = full_and_frozen(evaluator, model_dir, MIXED)
    flat = [value for sequence in found for value in sequence]
    assert measured.score == pytest.approx(-sum(flat) / len(flat), rel=1e-3)
    assert len(measured.outcomes) == len(found)
    expected = [-sum(sequence) * len(found) / len(flat) for sequence in found]
    assert measured.outcomes == pytest.approx(expected, rel=1e-2)
    assert np.mean(measured.outcomes) == pytest.approx(measured.score, rel=1e-12)


def test_fewer_bits_diverge_more_and_16_bits_not_at_all(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str]
) -> None:
    evaluator = proxied(tmp_path, model_dir, data_files, context={"reference_bits": (16,)})
    scores = [evaluated(evaluator, Configuration.uniform(bits, 2, 3), 2).score for bits in (2, 4, 8, 16)]
    assert scores == sorted(scores)
    assert scores[0] < 2 * scores[1] < 0
    assert scores[3] == 0.0


def test_configurations_that_differ_in_rank_alone_are_measured_once(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = proxied(tmp_path, model_dir, data_files)
    measured, calls = frozen(evaluator)._measured, []
    monkeypatch.setattr(frozen(evaluator), "_measured", lambda: calls.append(1) or measured())
    first, second, third = evaluator.evaluate(requests(2, MIXED, OTHER_RANKS, Configuration.uniform(4, 2, 3)))
    assert first.outcomes == second.outcomes
    assert (first.configuration, second.configuration) == (MIXED, OTHER_RANKS)
    assert first.footprint.adapters < second.footprint.adapters
    assert third.score != first.score
    assert len(calls) == 2


def test_the_proxy_trains_nothing_and_leaves_no_checkpoint(
    proxy: tuple[FrozenDivergenceEvaluator, Evaluation],
) -> None:
    evaluator, measured = proxy
    assert measured.ok
    assert measured.checkpoint is None
    assert not (evaluator._finetune.parts.context.run_dir / "checkpoints").exists()
    evaluator.discard(measured)


def test_higher_rungs_are_ordinary_fine_tuning_from_step_0(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str]
) -> None:
    evaluator = proxied(tmp_path / "proxy", model_dir, data_files)
    plain = opened(tmp_path / "plain", model_dir, data_files)
    evaluated(evaluator, MIXED, 2)
    evaluated(plain, MIXED, 2)
    assert evaluator._finetune.parts.rungs.begins_at(MIXED, 4) == 0
    for steps in (4, 6):
        found, expected = (evaluated(one, MIXED, steps) for one in (evaluator, plain))
        assert found.outcomes == expected.outcomes
        assert found.checkpoint == expected.checkpoint
    assert evaluator.item_weights == plain.item_weights
    assert evaluator.fingerprint() == plain.fingerprint()


def test_groups_are_single_at_the_proxy_and_cohorts_above(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str]
) -> None:
    evaluator = proxied(tmp_path, model_dir, data_files, cohort=2, model={"lora_dropout": 0.0})
    asked = requests(2, MIXED, OTHER_RANKS) + requests(4, MIXED, OTHER_RANKS)
    assert [len(group) for group in evaluator.groups(asked)] == [1, 1, 2]
    together = in_groups(evaluator, asked)
    assert [e.steps for e in together] == [2, 2, 4, 4]
    assert [e.checkpoint is None for e in together] == [True, True, False, False]
    alone = evaluated(proxied(tmp_path / "alone", model_dir, data_files, model={"lora_dropout": 0.0}), MIXED, 4)
    assert together[2].score == pytest.approx(alone.score, rel=1e-5)


def test_another_process_measures_the_same(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str], proxy: tuple[FrozenDivergenceEvaluator, Evaluation]
) -> None:
    later = proxied(tmp_path, model_dir, data_files)
    torch.manual_seed(12345)
    evaluated(later, Configuration.uniform(4, 2, 3), 4)  # training in between, and released weights
    assert evaluated(later, MIXED, 2).outcomes == proxy[1].outcomes


def test_settings_decide_what_is_trained_and_not_the_proxy(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str], proxy: tuple[FrozenDivergenceEvaluator, Evaluation]
) -> None:
    evaluator = proxied(tmp_path, model_dir, data_files)
    rates = SharedLadder("learning_rate", (1e-4, 1e-1))
    evaluator.check_shared(rates)
    names = tuple(shape.name for shape in evaluator.shapes)
    evaluator.memory_model(SearchSpace((2, 4, 8), (2, 4), names, (rates,)))
    tuned = [MIXED.with_shared({"learning_rate": rate}) for rate in rates.values]
    assert {evaluated(evaluator, c, 2).score for c in (MIXED, *tuned)} == {proxy[1].score}
    assert len({evaluated(evaluator, c, 4).score for c in (MIXED, *tuned)}) == 3
    assert evaluator.proxy


def test_a_fit_of_as_many_steps_has_the_score_of_the_highest_rung(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str]
) -> None:
    evaluator = proxied(tmp_path, model_dir, data_files)
    expected = [evaluated(evaluator, MIXED, steps) for steps in (2, 6)][1]
    score, _ = score_of_fit(model_dir, data_files)
    assert score == pytest.approx(expected.score, abs=0)


def test_test_scores_of_a_proxy_are_those_of_the_frozen_weights(
    proxy: tuple[FrozenDivergenceEvaluator, Evaluation], tmp_path: Path, model_dir: Path, data_files: dict[str, str]
) -> None:
    evaluator, measured = proxy
    plain = opened(tmp_path, model_dir, data_files)
    bare = evaluated(plain, Configuration.of(MIXED.bits, (0, 0, 0)), 2)
    assert evaluator.test(measured) == plain.test(bare)


def test_all_positions_and_half_precision_change_little_of_nothing(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str], proxy: tuple[FrozenDivergenceEvaluator, Evaluation]
) -> None:
    half = evaluated(proxied(tmp_path / "half", model_dir, data_files, stored="float16"), MIXED, 2)
    assert half.score == pytest.approx(proxy[1].score, rel=2e-2)
    everywhere = proxied(tmp_path / "all", model_dir, data_files, positions="all", max_positions=None)
    evaluated(everywhere, MIXED, 2)
    kept = sum(len(target.positions) for target in frozen(everywhere).targets)
    masks = [batch["attention_mask"] for batch in everywhere._finetune.parts.data.calibration_batches(3, 4)]
    assert kept == sum(int(mask.sum()) - len(mask) for mask in masks)


def test_positions_are_bounded_and_evenly_spaced(tmp_path: Path, model_dir: Path, data_files: dict[str, str]) -> None:
    batches = proxied(tmp_path, model_dir, data_files)._finetune.parts.data.calibration_batches(3, 4)
    every = torch.cat(chosen_positions(batches, "all", None))
    chosen = torch.cat(chosen_positions(batches, "all", 5))
    assert chosen.tolist() == every[[len(every) * k // 5 for k in range(5)]].tolist()


def test_logits_in_chunks_give_the_same(
    proxy: tuple[FrozenDivergenceEvaluator, Evaluation], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator, measured = proxy
    monkeypatch.setattr("qratk.training.divergence._CHUNK_BYTES", 4 * 96 * 2)
    frozen(evaluator)._scores.clear()
    assert evaluated(evaluator, MIXED, 2).score == pytest.approx(measured.score, rel=1e-6)


def test_running_out_of_memory_is_recorded(
    proxy: tuple[FrozenDivergenceEvaluator, Evaluation], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator, _ = proxy

    def exhausted(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(frozen(evaluator), "_logits", exhausted)
    failed = evaluated(evaluator, Configuration.uniform(2, 2, 3), 2)
    assert (failed.status, failed.reason.split(":")[0]) == ("lost", "OutOfMemoryError")


def test_a_ladder_of_one_rung_is_refused(tmp_path: Path, model_dir: Path, data_files: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError, match=r"\[1, 900\]"):
        proxied(tmp_path, model_dir, data_files, ladder=FidelityLadder((5,)))


@pytest.mark.parametrize("wrong", [{"positions": "some"}, {"stored": "int8"}, {"max_positions": 0}])
def test_wrong_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        FrozenDivergenceEvaluator(**wrong)


def test_it_is_registered() -> None:
    assert isinstance(evaluators.create("frozen_divergence", calibration_batches=2), FrozenDivergenceEvaluator)
