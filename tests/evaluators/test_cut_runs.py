"""Searches and fits with adapters that are trained wide: one training serves all ranks, and the file is their cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_runs import MIXED, evaluated, in_groups, opened, resumed_fit, same_tensors, score_of_fit
from safetensors.torch import load_file

from qratk.adapters.cut import CutAdapters
from qratk.components import REGISTRIES
from qratk.core import Candidate, Configuration, Evaluation, Request
from qratk.data.multiple_choice import MultipleChoiceData
from qratk.evaluators.finetune import FineTuneEvaluator
from qratk.loop import SearchLoop
from qratk.reporters.terminal import TerminalReporter
from qratk.run import files
from qratk.run.journal import read_journal
from qratk.training.module import FineTuneModule
from qratk.training.trainers import quiet_lightning

NARROWER = Configuration.from_text("2:2 4:2 8:2")  # the bits of MIXED
OTHER = Configuration.from_text("4:2 4:4 8:2")


def cutting(**options: Any) -> dict[str, Any]:
    return {"adapter": {"class_path": "cut", "init_args": {"width": 6, "batches": 1, **options}}}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by an entry with each training step of a candidate alone."""
    counted: list[int] = []
    step = FineTuneModule.training_step

    def counting(self: FineTuneModule, batch: Any, index: int) -> torch.Tensor:
        counted.append(index)
        return step(self, batch, index)

    monkeypatch.setattr(FineTuneModule, "training_step", counting)
    return counted


@pytest.fixture(scope="module")
def straight(
    tmp_path_factory: pytest.TempPathFactory, model_dir: Path, data_files: dict[str, str]
) -> tuple[FineTuneEvaluator, Evaluation, Evaluation]:
    """An evaluator, and evaluations of two configurations that differ in ranks alone."""
    evaluator = opened(tmp_path_factory.mktemp("straight"), model_dir, data_files, **cutting())
    return evaluator, evaluated(evaluator, MIXED, 6), evaluated(evaluator, NARROWER, 6)


def test_ranks_alone_cost_a_cut_and_a_scoring(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str], steps: list[int]
) -> None:
    evaluator = opened(tmp_path, model_dir, data_files, **cutting())
    first = evaluated(evaluator, MIXED, 6)
    assert len(steps) == 6
    second = evaluated(evaluator, NARROWER, 6)
    assert len(steps) == 6
    assert first.ok
    assert second.ok
    assert second.checkpoint == first.checkpoint
    assert second.trained_as == first.trained_as == Configuration.from_text("2:6 4:6 8:6").digest
    assert second.outcomes != first.outcomes
    assert second.footprint.storage_bytes < first.footprint.storage_bytes
    evaluated(evaluator, OTHER, 6)
    assert len(steps) == 12


def test_a_cut_scores_as_if_it_had_a_training_of_its_own(
    tmp_path: Path,
    model_dir: Path,
    data_files: dict[str, str],
    straight: tuple[FineTuneEvaluator, Evaluation, Evaluation],
) -> None:
    alone = evaluated(opened(tmp_path, model_dir, data_files, **cutting()), NARROWER, 6)
    assert alone.outcomes == straight[2].outcomes


def test_continuing_from_rung_to_rung_is_bit_identical_to_not_stopping(
    tmp_path: Path,
    model_dir: Path,
    data_files: dict[str, str],
    straight: tuple[FineTuneEvaluator, Evaluation, Evaluation],
) -> None:
    whole, expected, narrower = straight
    evaluator = opened(tmp_path, model_dir, data_files, **cutting())
    evaluated(evaluator, NARROWER, 2)  # other ranks begin what these go on with
    later = opened(tmp_path, model_dir, data_files, **cutting())  # another process
    torch.manual_seed(12345)
    evaluated(later, MIXED, 4)
    assert evaluated(later, MIXED, 6).outcomes == expected.outcomes
    assert evaluated(later, NARROWER, 6).outcomes == narrower.outcomes
    assert expected.checkpoint is not None
    stored = Path(expected.checkpoint) / "adapter.safetensors"
    assert same_tensors(tmp_path / stored, whole.parts.context.run_dir / stored)


def test_a_test_score_is_that_of_the_cut(straight: tuple[FineTuneEvaluator, Evaluation, Evaluation]) -> None:
    evaluator, expected, narrower = straight
    again = evaluator.test(expected)
    assert evaluator.test(narrower) != again
    assert evaluator.test(expected) == again


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("allocation", ["projection", "model"])
def test_a_fit_has_the_score_of_the_search_and_so_has_the_file_in_plain_peft(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str], allocation: str
) -> None:
    from peft import PeftModel

    from qratk.exporters.native import native_model

    options = cutting(allocation=allocation)
    searched = evaluated(opened(tmp_path / "search", model_dir, data_files, **options), MIXED, 6)
    score, module = score_of_fit(model_dir, data_files, **options)
    assert score == pytest.approx(searched.score, abs=0)
    module.save_adapter(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(tensor.nbytes for tensor in tensors.values()) <= searched.footprint.adapters
    ranks = {len(tensor) for name, tensor in tensors.items() if "lora_A" in name}
    assert ranks == {2, 4} if allocation == "projection" else len(ranks) > 2
    plain = PeftModel.from_pretrained(native_model(module.backbone, MIXED), str(tmp_path / "adapter")).eval()
    batch = {"input_ids": torch.arange(3, 20)[None], "attention_mask": torch.ones(1, 17, dtype=torch.int64)}
    module.eval()
    with torch.no_grad(), module.backbone.stored_precision():
        torch.testing.assert_close(plain(**batch).logits, module(batch), rtol=0, atol=0)
    with torch.no_grad():
        assert not torch.equal(plain(**batch).logits, module(batch))  # what is trained is wider


@pytest.mark.parametrize("rslora", [False, True])
def test_merged_weights_are_those_of_the_stored_adapters(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str], rslora: bool
) -> None:
    from peft import PeftModel

    from qratk.exporters.dense import merged_model
    from qratk.exporters.native import native_model

    evaluator = opened(tmp_path, model_dir, data_files, rslora=rslora, **cutting())
    evaluated(evaluator, MIXED, 6)
    backbone = evaluator.parts.module.backbone
    backbone.save_adapter(tmp_path / "adapter", MIXED)
    plain = PeftModel.from_pretrained(native_model(backbone, MIXED), str(tmp_path / "adapter")).eval()
    merged = merged_model(backbone, dtype=torch.float32).eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_fit_resumed_from_a_checkpoint_equals_an_uninterrupted_one(
    tmp_path: Path,
    model_dir: Path,
    data_files: dict[str, str],
    straight: tuple[FineTuneEvaluator, Evaluation, Evaluation],
) -> None:
    _, module = resumed_fit(tmp_path / "half.ckpt", model_dir, data_files, **cutting())
    assert module.last_outcomes == straight[1].outcomes


def test_moments_are_in_the_state_for_the_metric_of_the_inputs_alone(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str]
) -> None:
    evaluator = opened(tmp_path, model_dir, data_files, **cutting())
    evaluated(evaluator, MIXED, 2)
    _, state = evaluator.parts.rungs.latest(NARROWER, 2)
    assert state is not None
    moments = [value for name, value in state.adapter.items() if name.endswith("moment")]
    assert len(moments) == len(evaluator.parts.module.backbone.banks)
    for moment in moments:
        assert moment.shape == (6, 6)
        assert torch.linalg.eigvalsh(moment).min() > -1e-3 * moment.abs().max()
    plain = opened(tmp_path / "plain", model_dir, data_files, **cutting(metric="plain"))
    evaluated(plain, MIXED, 2)
    _, state = plain.parts.rungs.latest(MIXED, 2)
    assert state is not None
    assert not any(name.endswith("moment") for name in state.adapter)


# Side by side


def requests(*configurations: Configuration, steps: int = 6) -> list[Request]:
    return [Request(Candidate(configuration, "test"), steps) for configuration in configurations]


ALL = (MIXED, OTHER, NARROWER, Configuration.from_text("4:4*3"))


@pytest.mark.parametrize(
    ("options", "rslora"),
    [({}, False), ({"allocation": "block"}, True), ({"metric": "plain"}, False)],
    ids=["default", "by block, rank-stabilised", "plain metric"],
)
def test_candidates_side_by_side_are_trained_at_the_width_and_cut_each(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str], options: dict[str, Any], rslora: bool
) -> None:
    given = {"rslora": rslora, "lora_dropout": 0.0, **cutting(**options)}
    alone = opened(tmp_path / "alone", model_dir, data_files, **given)
    together = opened(tmp_path / "together", model_dir, data_files, cohort=3, **given)
    for steps in (2, 6):
        expected = {e.configuration: e for e in in_groups(alone, requests(*ALL, steps=steps))}
        found = in_groups(together, requests(*ALL, steps=steps))
        assert {e.configuration for e in found} == set(ALL)
        for evaluation in found:
            assert evaluation.ok
            assert evaluation.score == pytest.approx(expected[evaluation.configuration].score, rel=2e-5)
            assert evaluation.checkpoint == expected[evaluation.configuration].checkpoint
    assert together.test(found[0])["score"] == pytest.approx(alone.test(found[0])["score"], rel=2e-5)


def test_a_group_has_all_that_is_trained_alike(tmp_path: Path, model_dir: Path, data_files: dict[str, str]) -> None:
    evaluator = opened(tmp_path, model_dir, data_files, cohort=2, **cutting())
    groups = [[r.configuration for r in group] for group in evaluator.groups(requests(*ALL))]
    assert groups == [[MIXED, NARROWER, OTHER], [ALL[3]]]


def test_what_the_journal_holds_a_training_of_is_only_scored_whoever_asks(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    journal: list[Evaluation] = []
    evaluator = opened(
        tmp_path, model_dir, data_files, cohort=4, context={"measured": lambda: iter(journal)}, **cutting()
    )
    journal += in_groups(evaluator, requests(MIXED, OTHER))
    groups = [[r.configuration for r in group] for group in evaluator.groups(requests(NARROWER, ALL[3], MIXED))]
    assert groups == [[NARROWER], [ALL[3]]]  # and MIXED is there itself
    trained: list[int] = []
    from qratk.training.cohort_module import CohortModule

    losses = CohortModule.candidate_losses

    def counting(self: CohortModule, batch: Any) -> torch.Tensor:
        trained.append(len(self.cohort))
        return losses(self, batch)

    monkeypatch.setattr(CohortModule, "candidate_losses", counting)
    both = requests(NARROWER, Configuration.from_text("4:4 4:4 8:2"))  # as MIXED and OTHER
    assert [len(group) for group in evaluator.groups(both)] == [2]
    assert all(e.ok for e in in_groups(evaluator, both))
    assert trained == []


def recorded(evaluator: FineTuneEvaluator, template: Evaluation, request: Request, *, failed: bool) -> Evaluation:
    """As an evaluation of a request is in the journal."""
    trained_as = evaluator.parts.trained_as(request.configuration)
    found = replace(template, configuration=request.configuration, steps=request.steps, trained_as=trained_as)
    return replace(found, status="failed", score=float("-inf"), reason="diverged") if failed else found


def test_the_groups_of_the_rest_are_those_of_the_whole(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str]
) -> None:
    journal: list[Evaluation] = []
    measured = {"measured": lambda: iter(journal)}
    evaluator = opened(tmp_path, model_dir, data_files, cohort=2, context=measured, **cutting())
    bits = ((2, 2, 4), (4, 2, 4), (8, 2, 4), (2, 8, 4), (4, 4, 4))
    asked = requests(*(Configuration.of(b, (r, 2, 2)) for r in (2, 4) for b in bits))
    groups = [list(group) for group in evaluator.groups(asked)]
    assert [len(group) for group in groups] == [4, 4, 2]
    template = evaluated(evaluator, MIXED, 2)
    for done in range(3):  # groups end in any order, and some fail
        journal[:] = [recorded(evaluator, template, r, failed=r.configuration.bits == bits[0]) for r in groups[done]]
        left = [list(group) for group in evaluator.groups(asked)]
        assert left == [group for index, group in enumerate(groups) if index != done]


def test_a_loss_that_is_not_finite_fails_all_that_are_trained_alike(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str]
) -> None:
    options = {**cutting(), "learning_rate": 1e30, "lora_dropout": 0.0}
    evaluator = opened(tmp_path, model_dir, data_files, cohort=2, **options)
    found = in_groups(evaluator, requests(MIXED, OTHER, NARROWER))
    assert [e.status for e in found] == ["failed"] * 3
    alone = opened(tmp_path / "alone", model_dir, data_files, **options)
    assert [e.status for e in in_groups(alone, requests(MIXED, NARROWER))] == ["failed"] * 2


def test_masters_return_to_the_optimiser_after_a_scoring(
    straight: tuple[FineTuneEvaluator, Evaluation, Evaluation],
) -> None:
    evaluator, _, narrower = straight
    evaluator.parts.alone.train(narrower.configuration, 6)
    adapters = evaluator.parts.module.backbone.adapters
    assert isinstance(adapters, CutAdapters)
    before = adapters.parameters()
    with adapters.stored_precision(), adapters.stored_precision():
        assert {adapters.pairs.rank(name) for name in adapters.banks} == {2}
    assert all(a is b for (_, a), (_, b) in zip(before, adapters.parameters(), strict=True))
    assert {adapters.rank(name) for name in adapters.banks} == {2}


# Searches


def searched(folder: Path, model_dir: Path, data_files: dict[str, str]) -> list[tuple[object, ...]]:
    """What the journal of a small search holds when that is over."""
    module = FineTuneModule(str(model_dir), learning_rate=1e-2, **cutting())
    data = MultipleChoiceData(**data_files, batch_size=4, score="log_likelihood")
    loop = SearchLoop(
        evaluator=FineTuneEvaluator(cohort=2),
        searcher=REGISTRIES["searchers"].create("random", offspring=5),
        refiner=REGISTRIES["refiners"].create("none"),
        surrogate=REGISTRIES["surrogates"].create("none"),
        mutations=[REGISTRIES["mutations"].create("uniform")],
        repair=REGISTRIES["repairs"].create("greedy"),
        bits_importance=REGISTRIES["estimators"].create("uniform"),
        rank_importance=REGISTRIES["estimators"].create("uniform"),
        bits=[2, 4],
        ranks=[2, 4],
        like=[4, 4],
        steps=[1, 2],
        generations=2,
        high_fidelity_candidates=2,
    )
    with quiet_lightning():
        loop.run(run_dir=folder, reporter=TerminalReporter(plain=True), config={}, module=module, datamodule=data)
    records = read_journal(folder / files.JOURNAL).records
    return [(e.configuration, e.steps, e.score, e.trained_as, e.checkpoint) for e in (r.evaluation for r in records)]


def test_a_search_that_is_interrupted_anywhere_comes_to_the_same_to_the_bit(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = searched(tmp_path / "whole", model_dir, data_files)
    assert len({trained_as for _, steps, _, trained_as, _ in whole if steps == 1}) < sum(e[1] == 1 for e in whole)
    evaluate, calls = FineTuneEvaluator.evaluate, [0]

    def interrupted(self: FineTuneEvaluator, group: Sequence[Request]) -> Sequence[Evaluation]:
        calls[0] += 1
        found = evaluate(self, group)  # states are kept, and not yet what came of them
        if calls[0] in (3, 6):
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(FineTuneEvaluator, "evaluate", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            searched(tmp_path / "halves", model_dir, data_files)
    assert searched(tmp_path / "halves", model_dir, data_files) == whole
