"""Candidates evaluated side by side: the same outcomes as one after another, whatever happens to one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_runs import LADDER, MIXED, in_groups, measured, opened, score_of_fit, search

from qratk.core import Candidate, Configuration, ConfigurationError, Evaluation, Request
from qratk.core.evaluation import replicate_seed
from qratk.evaluators.finetune import FineTuneEvaluator
from qratk.training import cohort_speed
from qratk.training.cohort_module import CohortModule
from qratk.training.module import FineTuneModule

TEXTS = ("2:2 4:4 8:2", "4:2*3", "8:4 2:4 2:2", "2:4*3", "4:4 8:2 2:2")
CONFIGURATIONS = tuple(Configuration.from_text(text) for text in TEXTS)


def requests(steps: int, configurations: Sequence[Configuration] = CONFIGURATIONS) -> list[Request]:
    return [Request(Candidate(configuration, "test"), steps) for configuration in configurations]


def climbed(evaluator: FineTuneEvaluator) -> list[Evaluation]:
    """Every configuration at each rung."""
    return [evaluation for steps in LADDER.steps for evaluation in in_groups(evaluator, requests(steps))]


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.2])
def test_scores_and_checkpoints_are_those_of_one_after_another(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str], dropout: float
) -> None:
    options: dict[str, Any] = {"clip": 0.1, "lora_dropout": dropout, "warmup_steps": 1}
    alone = opened(tmp_path / "alone", model_dir, data_files, **options)
    together = opened(tmp_path / "together", model_dir, data_files, cohort=3, **options)
    one_by_one, side_by_side = climbed(alone), climbed(together)
    assert [e.configuration for e in side_by_side] == [e.configuration for e in one_by_one]
    for expected, found in zip(one_by_one, side_by_side, strict=True):
        assert found.ok
        assert found.score == pytest.approx(expected.score, rel=1e-5)
        assert found.outcomes == pytest.approx(expected.outcomes, rel=1e-4)
        assert found.checkpoint == expected.checkpoint
        assert found.figures == pytest.approx(expected.figures, rel=1e-4, abs=1e-6)
        assert {"acc", "prob_per_char", "log_likelihood_fitted", "nats"} < found.figures.keys()
        assert found.figures["log_likelihood"] == found.score
    assert len({round(e.score, 4) for e in side_by_side}) > 5  # there is something to tell apart
    # Either continues what the other began.
    assert together.test(one_by_one[-1])["score"] == pytest.approx(alone.test(one_by_one[-1])["score"], rel=1e-5)


def test_the_losses_of_a_rung_agree_with_training_alone(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone: list[list[float]] = []
    together: list[torch.Tensor] = []
    from qratk.training.module import FineTuneModule

    step, whole = FineTuneModule.training_loss, CohortModule.candidate_losses

    def one(self: FineTuneModule, batch: Any) -> torch.Tensor:
        loss = step(self, batch)
        alone[-1].append(float(loss.detach()))
        return loss

    def several(self: CohortModule, batch: Any) -> torch.Tensor:
        losses = whole(self, batch)
        together.append(losses.detach())
        return losses

    monkeypatch.setattr(FineTuneModule, "training_loss", one)
    monkeypatch.setattr(CohortModule, "candidate_losses", several)
    first = opened(tmp_path / "alone", model_dir, data_files, clip=0.1)
    for configuration in CONFIGURATIONS:
        alone.append([])
        in_groups(first, requests(6, [configuration]))
    in_groups(opened(tmp_path / "together", model_dir, data_files, clip=0.1, cohort=5), requests(6))
    torch.testing.assert_close(torch.stack(together).T, torch.tensor(alone), rtol=1e-5, atol=0)


def test_candidates_that_continue_from_different_rungs_are_not_mixed(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str]
) -> None:
    evaluator = opened(tmp_path, model_dir, data_files, cohort=8)
    in_groups(evaluator, requests(2, CONFIGURATIONS[:2]))
    assert [len(group) for group in evaluator.groups(requests(4))] == [2, 3]
    assert [len(group) for group in evaluator.groups(requests(2))] == [5]


def test_a_cohort_killed_between_its_checkpoints_comes_out_the_same(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str]
) -> None:
    evaluator = opened(tmp_path, model_dir, data_files, cohort=5)
    in_groups(evaluator, requests(2))
    whole = in_groups(evaluator, requests(4))
    for evaluation in whole[2:]:
        evaluator.discard(evaluation)
    again = in_groups(evaluator, requests(4))
    assert [e.outcomes for e in again] == [e.outcomes for e in whole]
    scored = in_groups(evaluator, requests(4))  # all checkpoints there: scored only
    assert [e.outcomes for e in scored] == [e.outcomes for e in whole]


def test_a_candidate_whose_loss_is_not_finite_fails_alone(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = climbed(opened(tmp_path / "whole", model_dir, data_files, cohort=5))[:5]
    losses = CohortModule.candidate_losses

    def broken(self: CohortModule, batch: Any) -> torch.Tensor:
        found = losses(self, batch)
        return found * torch.tensor([1.0, torch.nan, 1.0, 1.0, 1.0])

    monkeypatch.setattr(CohortModule, "candidate_losses", broken)
    found = in_groups(opened(tmp_path / "broken", model_dir, data_files, cohort=5), requests(2))
    assert [e.ok for e in found] == [True, False, True, True, True]
    assert "learning rate" in found[1].reason
    assert found[1].checkpoint is None
    assert [e.outcomes for e in found[2:]] == [e.outcomes for e in expected[2:]]


def test_a_cohort_that_does_not_fit_goes_on_in_halves(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = CohortModule.training_step

    def limited(self: CohortModule, batch: Any, batch_idx: int) -> torch.Tensor:
        if len(self.cohort) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(CohortModule, "training_step", limited)
    said: list[str] = []
    evaluator = opened(tmp_path, model_dir, data_files, cohort=5, context={"say": said.append})
    found = in_groups(evaluator, requests(2))
    assert [e.configuration for e in found] == list(CONFIGURATIONS)
    assert all(e.ok for e in found)
    assert "cohort=3" in said[0]
    again = len(said)
    assert all(e.ok for e in in_groups(evaluator, requests(4)))
    assert len(said) == again  # what did not fit once is not tried again


def test_a_group_is_trained_as_it_is_handed(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: list[int] = []
    step = CohortModule.training_step

    def seen(self: CohortModule, batch: Any, batch_idx: int) -> torch.Tensor:
        widths.append(len(self.cohort))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(CohortModule, "training_step", seen)
    evaluator = opened(tmp_path, model_dir, data_files, cohort=2)
    assert [e.ok for e in evaluator.evaluate(requests(2)[:3])] == [True] * 3
    assert set(widths) == {3}


def test_dropout_beside_a_layer_without_adapter_is_trained_alone(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str]
) -> None:
    evaluator = opened(tmp_path, model_dir, data_files, cohort=5, lora_dropout=0.2)
    bare = Configuration.from_text("4:0 4:2 4:2")
    assert [len(group) for group in evaluator.groups(requests(2, [*CONFIGURATIONS[:2], bare]))] == [1, 1, 1]


def test_configurations_without_any_adapter_are_scored_as_they_are(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str]
) -> None:
    bare = [Configuration.uniform(4, 0, 3), Configuration.uniform(8, 0, 3)]
    alone = [e for c in bare for e in opened(tmp_path / "a", model_dir, data_files).evaluate(requests(2, [c]))]
    together = list(
        opened(tmp_path / "t", model_dir, data_files, cohort=2, lora_dropout=0.0).evaluate(requests(2, bare))
    )
    assert all(e.ok for e in (*alone, *together))
    assert [e.score for e in together] == pytest.approx([e.score for e in alone], rel=1e-6)


def test_auto_measures_once_and_is_recorded(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    decided: dict[str, Any] = {}

    def kept(key: str, decide: Callable[[], Any]) -> Any:
        if key not in decided:
            decided[key] = decide()
        return decided[key]

    evaluator = opened(tmp_path, model_dir, data_files, cohort="auto", context={"decided": kept})
    tried: list[int] = []

    def timed(module: Any, trainer: Any, batch: Any, members: Sequence[Configuration]) -> float:
        tried.append(len(members))
        return {1: 1.0, 2: 0.5, 4: 0.49}[len(members)]

    monkeypatch.setattr(cohort_speed, "_seconds_a_candidate", timed)
    assert [len(group) for group in evaluator.groups(requests(2))] == [2, 2, 1]
    assert [len(group) for group in evaluator.groups(requests(4))] == [2, 2, 1]
    assert tried == [1, 2, 4]
    assert decided["cohort"] == 2


def test_auto_really_trains_what_it_times(tmp_path: Path, model_dir: Path, data_files: dict[str, str]) -> None:
    evaluator = opened(tmp_path, model_dir, data_files, cohort="auto")
    found = in_groups(evaluator, requests(2))
    assert all(e.ok for e in found)
    expected = in_groups(opened(tmp_path / "alone", model_dir, data_files), requests(2))
    assert [e.score for e in found] == pytest.approx([e.score for e in expected], rel=1e-5)


def test_a_cohort_of_none_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="cohort"):
        FineTuneEvaluator(cohort=0)


@pytest.mark.slow
def test_a_search_takes_the_same_decisions_side_by_side(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str]
) -> None:
    for cohort in (1, 3):
        search(tmp_path / str(cohort), model_dir, data_files, cohort)
    alone, together = (measured(tmp_path / str(cohort)) for cohort in (1, 3))
    assert [(row[0], row[1], row[4]) for row in together] == [(row[0], row[1], row[4]) for row in alone]
    assert [row[2] for row in together] == pytest.approx([row[2] for row in alone], rel=1e-5)


def test_a_replicate_has_rows_adapters_and_states_of_its_own_alone_and_side_by_side(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, list[int]]] = []
    first = FineTuneModule.training_loss

    def looked_at(self: FineTuneModule, batch: Any) -> torch.Tensor:
        seen.append((self.options.training_seed, batch["input_ids"].flatten().tolist()))
        return first(self, batch)

    monkeypatch.setattr(FineTuneModule, "training_loss", looked_at)
    alone = opened(tmp_path / "alone", model_dir, data_files, lora_dropout=0.0)
    asked = [Request(Candidate(c, "test"), 4, number) for number in (0, 1) for c in CONFIGURATIONS[:2]]
    one_by_one = in_groups(alone, asked)
    scores = {(e.replicate, e.configuration): e.score for e in one_by_one}
    assert len(set(scores.values())) == 4
    seeds = [replicate_seed(0, number) for number in (0, 1)]
    assert [seed for seed, _ in seen[::4]] == [seed for seed in seeds for _ in range(2)]
    runs = [[row for _, row in seen[start : start + 4]] for start in range(0, 16, 4)]
    assert runs[0] == runs[1] != runs[2] == runs[3]  # one order of rows a replicate
    assert not alone.parts.module.options.replicate  # nothing stays behind
    assert not alone.parts.data.replicate
    again = opened(tmp_path / "again", model_dir, data_files, lora_dropout=0.0)
    assert in_groups(again, asked[2:3])[0].score == one_by_one[2].score  # to the bit, without the others
    assert len({e.checkpoint for e in one_by_one}) == 4
    assert all((tmp_path / "alone" / str(e.checkpoint)).is_dir() for e in one_by_one)
    alone.discard(one_by_one[2])
    assert not (tmp_path / "alone" / str(one_by_one[2].checkpoint)).exists()
    assert (tmp_path / "alone" / str(one_by_one[0].checkpoint)).exists()
    together = opened(tmp_path / "together", model_dir, data_files, lora_dropout=0.0, cohort=2)
    groups = list(together.groups(asked))
    assert [[request.replicate for request in group] for group in groups] == [[0, 0], [1, 1]]
    found = [evaluation for group in groups for evaluation in together.evaluate(group)]
    for expected, other in zip(one_by_one, found, strict=True):
        assert (other.configuration, other.replicate) == (expected.configuration, expected.replicate)
        assert other.score == pytest.approx(expected.score, rel=1e-5)


def test_a_fit_repeats_the_training_of_a_replicate(tmp_path: Path, model_dir: Path, data_files: dict[str, str]) -> None:
    evaluator = opened(tmp_path, model_dir, data_files)
    asked = [Request(Candidate(MIXED, "test"), 6, number) for number in (0, 2)]
    first, second = (evaluation.score for evaluation in in_groups(evaluator, asked))
    assert first != second
    assert score_of_fit(model_dir, data_files, replicate=2)[0] == pytest.approx(second, rel=1e-6)
    assert score_of_fit(model_dir, data_files, replicate=0)[0] == pytest.approx(first, rel=1e-6)


def test_a_replicate_of_a_whole_search_is_refused(tmp_path: Path, model_dir: Path, data_files: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError, match="replicate=2 is for a fit"):
        opened(tmp_path, model_dir, data_files, replicate=2)
