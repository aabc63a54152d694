"""A plan's figures are those of the real thing, without loading it."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from qratk import plan
from qratk.cli.plan import as_text
from qratk.core.configuration import Configuration
from qratk.core.errors import InfeasibleBudgetError
from qratk.settings.recipe import autoqra


def make_loop(**options):
    return autoqra(**{"like": [4, 8], "steps": [10, 30], **options})


@pytest.fixture(scope="module")
def module():
    from qratk.training.module import FineTuneModule

    return FineTuneModule("embedded")


@pytest.fixture(scope="module")
def data():
    from qratk.embedded.datamodule import EmbeddedData

    return EmbeddedData(max_train_items=64, max_validation_items=16)


@pytest.fixture(scope="module")
def made(module, data):
    return plan.make_plan(module, data, make_loop(references=[[16, 16]]))


@pytest.mark.parametrize("text", ["2:4", "4:8", "8:16"])
def test_planned_storage_equals_the_bytes_of_the_stored_tensors(made, module, text):
    configuration = Configuration.from_text(text)
    row = next(row for row in made.rows if row.name == "uniform" and row.configuration.startswith(text))
    backbone = module.backbone
    backbone.build_bank(configuration.bits)
    whole = Configuration(configuration.layers * len(backbone.layers))
    backbone.activate(whole, seed=0)
    packed = [bank.variants[whole.bits[0]].packed for bank in backbone.banks.values()]
    frozen = sum(tensor.nbytes for tensors in packed for tensor in tensors.values())
    adapters = sum(2 * tensor.numel() for tensor in backbone.adapter_state().values())
    assert row.footprint.weights + row.footprint.metadata == frozen
    assert row.footprint.adapters == adapters


def test_plan_loads_no_weights(data, monkeypatch):
    from qratk.training.module import FineTuneModule

    fresh = FineTuneModule("embedded")
    plan.make_plan(fresh, data, make_loop())
    assert fresh._backbone is None


def test_uniforms_fit_exactly_up_to_the_budget(made):
    uniforms = [row for row in made.rows if row.name == "uniform"]
    assert len(uniforms) == 9
    assert all(row.fits == (row.footprint.storage_bytes <= made.budget.limit_bytes) for row in uniforms)


def test_evaluations_are_those_of_the_loop(made):
    fitting = sum(row.fits for row in made.rows if row.name == "uniform")
    assert made.evaluations == make_loop(references=[[16, 16]]).planned_evaluations(fitting)


def test_steps_count_what_each_rung_adds_and_references_in_full():
    # Ten reach 10 steps; five of them go on by 20, one of these is a reference that starts from nothing.
    assert plan.total_steps({10: 10, 30: 5}, afresh=1) == 10 * 10 + 5 * 20 + 1 * 10
    assert plan.total_steps({7: 3}) == 21


def test_a_rung_that_trains_nothing_takes_no_steps_and_what_goes_up_from_it_begins_anew():
    assert plan.total_steps({1: 100, 30: 5}, untrained=1) == 5 * 30
    assert plan.total_steps({1: 100, 10: 10, 30: 5}, afresh=1, untrained=1) == 10 * 10 + 5 * 20 + 1 * 10


def test_plan_tells_ladders_of_settings_a_budget_of_runs_and_fresh_seeds(module, data):
    shared = {"learning_rate": [1e-3, 1e-2], "rslora": [False, True]}
    loop = make_loop(shared=shared, full_runs=40, confirm={"candidates": 2, "seeds": 3})
    made = plan.make_plan(module, data, loop)
    text = as_text(made)
    assert "settings     learning_rate 0.001/0.01, rslora false/true: 4 combinations" in text
    assert "effort       40 full runs of training in all" in text
    assert "; 9 of them run the best again with fresh seeds" in text
    assert made.steps <= 40 * loop.ladder.highest
    assert json.loads(json.dumps(made.as_dict()))["shared"] == shared
    plain = as_text(plan.make_plan(module, data, make_loop()))
    assert "settings" not in plain
    assert "fresh seeds" not in plain


def test_budget_under_the_smallest_names_the_smallest_feasible_figure(module, data, made):
    smallest = made.rows[0].footprint.storage_bytes
    with pytest.raises(InfeasibleBudgetError, match=str(smallest)):
        plan.make_plan(module, data, make_loop(like=None, limit="1KB"))


def test_workload_is_what_the_loader_really_pads_to(data, made):
    batches = list(data.calibration_batches(4))
    widest = max(batch["input_ids"].numel() for batch in batches)
    assert 0.5 * widest < made.workload.step_tokens <= 1.5 * widest


@pytest.mark.parametrize(("missing", "tokenizer"), [("train", True), ("validation", True), (None, False)])
def test_workload_falls_back_to_full_length_without_data_or_tokenizer(missing, tokenizer):
    data = SimpleNamespace(has=lambda split: split != missing, batch_size=4)
    found = plan.workload(data, 100, tokenizer=tokenizer)
    assert (found.step_tokens, found.validation_tokens) == (400.0, 0.0)
    assert (f"there is no {missing} data" if missing else "the model has no tokenizer") in found.source


def test_workload_of_rows_that_cannot_be_read_ends_in_the_whole_reason(tmp_path):
    from qratk.core.errors import DataError
    from qratk.data import TextData

    rows = tmp_path / "train.jsonl"
    rows.write_text('{"text": "red"}\n{"texts": "blue"}\n')
    with pytest.raises(
        DataError, match=r"train\.jsonl, line 2: the row needs a text field 'text', but has only 'texts'"
    ):
        plan.workload(TextData(str(rows)), 100)


def test_plan_for_machines_is_json_with_the_same_bytes(made):
    document = json.loads(json.dumps(made.as_dict()))
    assert [row["footprint"]["storage_bytes"] for row in document["rows"]] == [
        row.footprint.storage_bytes for row in made.rows
    ]
    assert made.seconds > 0


def test_plan_for_people_names_budget_space_and_time(made):
    text = as_text(made)
    assert f"{made.budget.limit_bytes:,} bytes" in text
    assert f"10^{made.log10_size:.1f}" in text
    assert "an estimate" in text


def test_training_peaks_are_traced_and_their_parts_sum_to_them(made):
    assert made.peak_source == "trace"
    for row in made.rows:
        assert sum(row.training_parts.values()) == row.training_bytes
        assert row.training_bytes <= 1.001 * row.footprint.training_bytes
        assert row.training_parts["weights"] == row.footprint.weights + row.footprint.metadata


def test_planned_training_peak_is_the_measured_one_within_five_percent():
    from qratk.embedded.datamodule import EmbeddedData
    from qratk.peaks.measure import measured_peak
    from qratk.training.module import FineTuneModule

    data = EmbeddedData(batch_size=2, max_train_items=16, max_validation_items=4)
    module = FineTuneModule("embedded", dense_cache="off")
    made = plan.make_plan(module, data, make_loop())
    row = next(row for row in made.rows if row.configuration.startswith("4:8"))
    configuration = Configuration.from_text("4:8" + " 4:8" * 11)
    batch_size, length = made.batch
    measured = measured_peak(module.backbone, configuration, batch_size=batch_size, sequence_length=length)
    assert row.training_bytes == pytest.approx(measured, rel=0.05)


def test_bank_of_a_search_is_that_of_all_its_bits(made, module):
    backbone = module.load_backbone()
    backbone.build_bank((2, 4, 8, 16))
    held = [t for bank in backbone.banks.values() for v in bank.variants.values() for t in v.packed.values()]
    assert made.search_memory.bits == (2, 4, 8, 16)  # 16 for the reference
    assert made.search_memory.bank_bytes == sum(tensor.nbytes for tensor in held)


def test_plan_for_people_shows_parts_of_the_peak_and_the_bank(made):
    text = as_text(made)
    assert "all labelled), by part:" in text
    assert "activations" in text
    assert "2, 4, 8, 16 bits that a search holds" in text


def test_plan_for_machines_has_the_parts(made):
    document = json.loads(json.dumps(made.as_dict()))
    assert document["peak_source"] == "trace"
    assert set(document["rows"][0]["training_parts"]) > {"gradients", "optimizer", "logits"}
    assert document["search_memory"]["bank_bytes"] == made.search_memory.bank_bytes


def test_plan_says_how_fine_scores_are(made):
    (found,) = made.resolutions
    assert (found.steps, found.tasks[0].items, found.measured) == (30, 16, False)
    assert found.standard_error == pytest.approx(0.125)
    text = as_text(made)
    assert "score        at 30 steps: standard error at most 0.125" in text
    assert "told at 95 %: 0.346 over other items, 0.155 over the same if configurations differ on 10% of them" in text
    assert json.loads(json.dumps(made.as_dict()))["resolutions"][0]["tasks"][0]["items"] == 16


def test_plan_says_once_what_many_projections_have_in_common(data):
    from qratk.training.module import FineTuneModule

    narrow = FineTuneModule("embedded", quantizers="portable")  # rows of 96 do not divide into groups of 64
    found = plan.make_plan(narrow, data, make_loop(bits=[4, 8]))
    assert len(found.fallbacks) == 2
    assert all("model.layers.0" in text and "(and 71 more projections)" in text for text in found.fallbacks)


def test_plan_says_nothing_of_scores_without_bounds(module):
    from qratk.embedded.datamodule import EmbeddedData

    assert EmbeddedData(score="log_likelihood").judged(None) == ()


def test_texts_of_a_scoring_are_counted_in_the_batches_in_which_they_are_generated():
    import numpy as np

    from qratk.data.encoding import encoded

    prompts = [
        replace(encoded(np.arange(size), [False] * size, truncated=False, item=0), generates=8) for size in (3, 5, 4)
    ]
    found = plan._texts(prompts, 2, 0.5)
    assert sum(texts for texts, _, _ in found.batches) == 3
    assert (found.number, found.tokens) == (6, 8)
    assert found.passes == 2 * 7 * len(found.batches)
    assert plan._texts([], 2, 1.0) is None


@pytest.mark.parametrize(("texts", "prompt", "most"), [(8, 40, 24), (16, 100, 4)], ids=["writing", "reading"])
def test_generation_peak_is_what_real_generation_allocates(module, texts, prompt, most):
    import torch

    from qratk.data.generation import generate
    from qratk.peaks.allocated import allocated_peak

    backbone = module.backbone
    backbone.build_bank([4])
    backbone.activate(Configuration.uniform(4, 4, len(backbone.layers)), seed=0)
    backbone.dense_cache("off")  # dense weights are told apart
    backbone.model.eval()
    ids = torch.ones(texts, prompt, dtype=torch.int64)
    real = allocated_peak(lambda: generate(backbone.model, ids, torch.ones_like(ids), most=most), torch.device("cpu"))
    found = plan.generation(plan.Texts(((texts, prompt, most),)), backbone, 1e6)
    assert 0.9 * real < found.peak_bytes < 1.2 * real
    assert found.cache_bytes < found.peak_bytes
    assert found.seconds > 0
