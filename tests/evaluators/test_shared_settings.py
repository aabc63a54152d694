"""Settings of a configuration's own: trained as by a module that has them as its options, alone and side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from finetune_runs import LADDER, in_groups, opened

from qratk.core import Candidate, Configuration, ConfigurationError, Evaluation, Request, SearchSpace
from qratk.core.shared import Setting, SharedLadder
from qratk.evaluators.finetune import FineTuneEvaluator

LAYERS = Configuration.from_text("2:2 4:4 8:2")
OTHERS: Mapping[str, Setting] = {
    "alpha_over_rank": 1, "learning_rate": 0.003, "lora_dropout": 0.1, "schedule": "linear", "warmup_steps": 2,
    "weight_decay": 0.5,
}  # fmt: skip


def climbed(evaluator: FineTuneEvaluator, *configurations: Configuration) -> list[Evaluation]:
    return [
        evaluation
        for steps in LADDER.steps
        for evaluation in in_groups(evaluator, [Request(Candidate(c, "test"), steps) for c in configurations])
    ]


@pytest.mark.parametrize("settings", [OTHERS, {**OTHERS, "rslora": True}], ids=["scaled", "rank-stabilised"])
def test_training_by_own_settings_is_that_of_a_module_with_these_options(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str], settings: Mapping[str, Setting]
) -> None:
    own = opened(tmp_path / "own", model_dir, data_files)
    plain = opened(tmp_path / "plain", model_dir, data_files, **settings)
    ours, expected = climbed(own, LAYERS.with_shared(settings)), climbed(plain, LAYERS)
    assert [e.outcomes for e in ours] == [e.outcomes for e in expected]
    assert own.test(ours[-1]) == plain.test(expected[-1])
    # Nothing of it is left for a configuration without any.
    untouched = opened(tmp_path / "untouched", model_dir, data_files)
    assert climbed(own, LAYERS)[-1].outcomes == climbed(untouched, LAYERS)[-1].outcomes != ours[-1].outcomes


def test_candidates_side_by_side_follow_each_its_own_settings(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str]
) -> None:
    members = [
        LAYERS.with_shared({"learning_rate": 0.03, "weight_decay": 0.5}),
        Configuration.from_text("4:2*3 | learning_rate=0.003 schedule=linear rslora=true"),
        LAYERS.with_shared({"learning_rate": 0.01, "warmup_steps": 3, "alpha_over_rank": 1}),
        LAYERS,
    ]
    alone = climbed(opened(tmp_path / "alone", model_dir, data_files, clip=0.1), *members)
    together = climbed(opened(tmp_path / "together", model_dir, data_files, clip=0.1, cohort=4), *members)
    for expected, found in zip(alone, together, strict=True):
        assert found.configuration == expected.configuration
        assert found.score == pytest.approx(expected.score, rel=1e-5)
        assert found.outcomes == pytest.approx(expected.outcomes, rel=1e-4)
    assert len({round(e.score, 4) for e in alone[-4:]}) == 4


def test_candidates_of_different_dropout_are_trained_apart(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str]
) -> None:
    evaluator = opened(tmp_path, model_dir, data_files, cohort=4)
    members = [LAYERS.with_shared({"lora_dropout": share}) for share in (0, 0, 0.5, 0.5)]
    requests = [Request(Candidate(c, "test"), 2) for c in dict.fromkeys(members)]
    assert [len(group) for group in evaluator.groups(requests)] == [1, 1]


def test_starts_of_a_ladder_are_made_before_the_weights_are_dropped(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str]
) -> None:
    own = opened(tmp_path / "own", model_dir, data_files, cohort=3)
    space = SearchSpace(own.space.bits, own.space.ranks, own.space.layer_names, (STARTS,))
    own.memory_model(space)
    found = climbed(own, *(LAYERS.with_shared({"init": init}) for init in STARTS.values))
    for init, ours in zip(STARTS.values, found[-3:], strict=True):
        plain = opened(tmp_path / str(init), model_dir, data_files, init=init)
        assert ours.score == pytest.approx(climbed(plain, LAYERS)[-1].score, rel=1e-5)
    assert len({e.score for e in found[-3:]}) == 3


STARTS = SharedLadder("init", ("default", "loftq", "lq_lora"))


@pytest.mark.parametrize(
    ("options", "ladder", "said"),
    [
        ({"adapter": "adalora"}, STARTS, "search.shared.init: adalora begins"),
        ({"init_iterations": 2}, STARTS, "search.shared.init: .* give init_iterations=1"),
    ],
    ids=["adalora", "iterations"],
)
def test_settings_that_the_module_cannot_have_are_refused_before_the_first_step(
    tmp_path: Path,
    model_dir: Path,
    data_files: dict[str, str],
    options: dict[str, Any],
    ladder: SharedLadder,
    said: str,
) -> None:
    evaluator = opened(tmp_path, model_dir, data_files, **options)
    names = tuple(shape.name for shape in evaluator.shapes)
    with pytest.raises(ConfigurationError, match=said):
        evaluator.memory_model(SearchSpace((2, 4), (2, 4), names, (ladder,)))


def test_bytes_do_not_see_settings(tmp_path: Path, model_dir: Path, data_files: dict[str, str]) -> None:
    evaluator = opened(tmp_path, model_dir, data_files)
    assert evaluator.footprint(LAYERS.with_shared(OTHERS)) == evaluator.footprint(LAYERS)


def test_training_peak_counts_the_dropout_that_a_candidate_may_have(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str]
) -> None:
    peaks = []
    for share, ladders in ((0.0, ()), (0.5, ()), (0.0, (SharedLadder("lora_dropout", (0, 0.5)),))):
        evaluator = opened(tmp_path / str(len(peaks)), model_dir, data_files, lora_dropout=share)
        names = tuple(shape.name for shape in evaluator.shapes)
        memory = evaluator.memory_model(SearchSpace((2, 4, 8), (2, 4), names, ladders))
        assert evaluator.footprint(LAYERS) == memory.footprint(LAYERS)
        peaks.append(memory.footprint(LAYERS).training_bytes)
    assert peaks[0] < peaks[1] == peaks[2]
