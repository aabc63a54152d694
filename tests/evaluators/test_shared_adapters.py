"""The lowest rung with adapters trained once: those of a plain fit, cut as numpy cuts them, one training for all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finetune_runs import LADDER, MIXED, evaluated, in_groups, measured, opened, search
from lightning import Trainer

from qratk.core import Candidate, Configuration, ConfigurationError, FidelityLadder, Request, SearchSpace
from qratk.data.multiple_choice import MultipleChoiceData
from qratk.evaluators.base import EvaluationContext, evaluators
from qratk.evaluators.finetune import FineTuneEvaluator
from qratk.evaluators.shared_adapters import SharedAdaptersEvaluator
from qratk.training.cohort_module import CohortModule
from qratk.training.module import FineTuneModule
from qratk.training.trainers import quiet_lightning

CONFIGURATIONS = tuple(Configuration.from_text(text) for text in ("2:2 4:4 8:2", "4:2*3", "8:4 2:4 2:2"))
WIDE = Configuration.uniform(4, 4, 3)


def shared(
    run_dir: Path,
    model_dir: Path,
    data_files: dict[str, str],
    *,
    ladder: FidelityLadder = LADDER,
    ranks: tuple[int, ...] = (2, 4),
    given: dict[str, Any] | None = None,
    **options: Any,
) -> SharedAdaptersEvaluator:
    module = FineTuneModule(str(model_dir), **{"learning_rate": 1e-2, "lora_dropout": 0.2, **options})
    data = MultipleChoiceData(**data_files, batch_size=4, score="log_likelihood")
    evaluator = SharedAdaptersEvaluator(**{"cohort": 1, **(given or {})})
    evaluator.open(EvaluationContext(run_dir, ladder, 0, module, data, Trainer, say=lambda text: None))
    evaluator.memory_model(SearchSpace((2, 4, 8), ranks, tuple(shape.name for shape in evaluator.shapes)))
    return evaluator


def requests(steps: int, configurations: Sequence[Configuration] = CONFIGURATIONS) -> list[Request]:
    return [Request(Candidate(configuration, "test"), steps) for configuration in configurations]


@pytest.fixture
def steps_trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modules whose steps were taken, one after another."""
    steps: list[str] = []
    for module in (FineTuneModule, CohortModule):
        whole = module.training_step

        def counted(self: Any, *given: Any, whole: Any = whole) -> Any:
            steps.append(type(self).__name__)
            return whole(self, *given)

        monkeypatch.setattr(module, "training_step", counted)
    return steps


def cut_by_numpy(
    module: FineTuneModule, configuration: Configuration, deltas: dict[str, np.ndarray]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Masters of the best product of each rank, the length of a direction shared out evenly."""
    scaling = module.backbone.adapter_options(configuration).scaling
    for layer, choice in zip(module.backbone.layers, configuration.layers, strict=True):
        for name, _ in layer.modules:
            u, values, v = np.linalg.svd(deltas[name] / scaling(choice.rank))
            root = np.sqrt(values[: choice.rank])
            yield f"{name}.lora_A.weight", torch.tensor(root[:, None] * v[: choice.rank])
            yield f"{name}.lora_B.weight", torch.tensor(u[:, : choice.rank] * root)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_candidate_is_scored_with_the_best_cut_of_a_plain_fit(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str], rslora: bool
) -> None:
    found = evaluated(shared(tmp_path / "shared", model_dir, data_files, rslora=rslora), MIXED, 2)
    parts = opened(tmp_path / "plain", model_dir, data_files, rslora=rslora).parts
    parts.preparation.finish(SearchSpace((2, 4, 8), (2, 4), ("a", "b", "c")))
    parts.alone.train(WIDE, LADDER.highest)
    adapters = parts.module.backbone.adapters
    deltas = {name: adapters.delta(name).double().numpy() for name in parts.module.backbone.banks}
    parts.module.activate(MIXED)
    parts.module.backbone.load_adapter_state(dict(cut_by_numpy(parts.module, MIXED, deltas)))
    outcomes, cut = np.array(found.outcomes), np.array(parts.alone.scored().outcomes)
    parts.module.activate(MIXED)
    bare = np.array(parts.alone.scored().outcomes)
    assert np.abs(outcomes - cut).max() < 0.03 * np.abs(outcomes - bare).max()  # but for the rounding to 16 bits
    assert found.checkpoint is None
    assert found.figures["acc"] >= 0


def test_the_uniform_configuration_itself_has_the_score_of_its_full_run(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str]
) -> None:
    evaluator = shared(tmp_path, model_dir, data_files)
    assert evaluator.uniform == WIDE
    low, high = evaluated(evaluator, WIDE, 2), evaluated(evaluator, WIDE, 6)
    assert low.score == pytest.approx(high.score, rel=1e-3)
    assert evaluator.test(low)["score"] == pytest.approx(evaluator.test(high)["score"], rel=1e-3)
    evaluator.discard(low)
    assert evaluator.test(high)["score"] == pytest.approx(evaluator.test(low)["score"], rel=1e-3)


def test_one_training_serves_all_and_whoever_comes_later(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str], steps_trained: list[str]
) -> None:
    first = in_groups(shared(tmp_path, model_dir, data_files), requests(2))
    assert steps_trained == ["FineTuneModule"] * LADDER.highest
    again = in_groups(shared(tmp_path, model_dir, data_files, given={"cohort": 3}), requests(2))
    assert steps_trained == ["FineTuneModule"] * LADDER.highest
    for one, other in zip(first, again, strict=True):
        assert other.outcomes == pytest.approx(one.outcomes, rel=1e-4)
    assert len({round(evaluation.score, 5) for evaluation in first}) == len(CONFIGURATIONS)


def test_higher_rungs_are_those_of_fine_tuning_from_step_0(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str]
) -> None:
    ours, plain = shared(tmp_path / "shared", model_dir, data_files), opened(tmp_path / "plain", model_dir, data_files)
    in_groups(ours, requests(2))
    for steps in (4, 6):
        found, expected = evaluated(ours, MIXED, steps), evaluated(plain, MIXED, steps)
        assert found.outcomes == pytest.approx(expected.outcomes, rel=1e-6)
        assert found.checkpoint == expected.checkpoint


def test_ranks_over_that_of_the_training_change_nothing(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str]
) -> None:
    evaluator = shared(tmp_path, model_dir, data_files, ranks=(0, 2, 4), given={"rank": 2})
    narrow, wide, bare = (evaluated(evaluator, Configuration.uniform(4, rank, 3), 2) for rank in (2, 4, 0))
    assert wide.outcomes == pytest.approx(narrow.outcomes, rel=1e-6)
    assert bare.score != pytest.approx(narrow.score, rel=1e-4)


def test_replicates_share_a_training_of_their_own(tmp_path: Path, model_dir: Path, data_files: dict[str, str]) -> None:
    evaluator = shared(tmp_path, model_dir, data_files)
    first, second = (evaluator.evaluate([Request(Candidate(MIXED, "test"), 2, n)])[0] for n in (0, 1))
    assert first.outcomes != second.outcomes


def test_a_search_counts_the_training_for_all_and_nothing_at_the_lowest_rung(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str]
) -> None:
    result = search(tmp_path, model_dir, data_files, 2, SharedAdaptersEvaluator, full_runs=6)
    at = [steps for _, steps, *_ in measured(tmp_path)]
    assert at.count(1) > at.count(2) == 5
    assert result.best.steps == 2
    assert result.stop_reasons["budget"] == "6.00 of 6 full runs are trained"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ladder": FidelityLadder((6,))}, r"\[6\] have no other; put a rung before them"),
        ({"adapter": "cut"}, "the adapters are 'cut'; give adapter='lora'"),
        ({"adapter": "dora"}, "the adapters are 'dora'; give adapter='lora'"),
        ({"given": {"bits": 3}}, r"bits must be one of \[2, 4, 8\], got 3"),
        ({"given": {"rank": 0}}, "rank must be at least 1, or null"),
    ],
)
def test_what_cannot_be_is_refused_before_any_step(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        shared(tmp_path, model_dir, data_files, **options)


def test_a_shared_training_that_fails_ends_the_search(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = FineTuneModule.training_loss
    monkeypatch.setattr(FineTuneModule, "training_loss", lambda self, batch: whole(self, batch) * float("nan"))
    evaluator = shared(tmp_path, model_dir, data_files)
    with quiet_lightning(), pytest.raises(ConfigurationError, match="give a lower learning rate, or use the evaluator"):
        evaluated(evaluator, MIXED, 2)


def test_it_goes_by_its_name() -> None:
    made = evaluators.create("shared_adapters", bits=4, rank=8)
    assert isinstance(made, SharedAdaptersEvaluator)
    assert (made.shared_runs, made.proxy) == (1, "score with shared adapters")
    assert FineTuneEvaluator().shared_runs == 0
