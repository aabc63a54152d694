"""Batches of scoring: every target once, prompts shared, no padding that could be saved, the same figures in a run."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from qratk.core.batching import cheapest_cuts
from qratk.core.configuration import Configuration
from qratk.data import MultipleChoiceData, TextData, write_task
from qratk.data import batches as batches_module
from qratk.data.batches import pack_rows, scoring_batches
from qratk.data.encoding import Encoded, encoded
from qratk.data.lm_eval import run_lm_eval

Write = Callable[[str, list[Any]], str]


def random_rows(seed: int, items: int = 30) -> list[Encoded]:
    """Items of one to four rows over few tokens, so that prefixes agree by chance too; labels from anywhere on."""
    rng = np.random.default_rng(seed)
    rows = []
    for item in range(items):
        head = rng.integers(3, size=rng.integers(0, 9)).tolist()
        for _ in range(rng.integers(1, 5)):
            tokens = head + rng.integers(3, size=rng.integers(1, 7)).tolist()
            first = rng.integers(len(tokens) + 1)
            rows.append(encoded(tokens, [k >= first for k in range(len(tokens))], item=item))
    return rows


def read_back(batch: dict[str, torch.Tensor]) -> dict[int, list[tuple[list[int], int]]]:
    """For each scorer row, what each target is predicted from, followed in the batch token by token, and the target."""
    width = batch["input_ids"].shape[1]
    found: dict[int, list[tuple[list[int], int]]] = {row: [] for row in batch["row"].tolist()}
    targets = zip(*(batch[name].tolist() for name in ("target", "target_at", "target_row")), strict=True)
    for target, at, row in targets:
        b, t = divmod(int(batch["predictor"][at]), width)
        if "segments" in batch:
            segments, own = batch["segments"][b], int(batch["segments"][b, t])
            seen = [k for k in range(t + 1) if int(segments[k]) in (0, own)]
            assert batch["position_ids"][b, seen].tolist() == list(range(len(seen)))
        else:
            seen = list(range(t + 1))
        assert bool(batch["attention_mask"][b, seen].all())
        found[int(batch["row"][row])].append((batch["input_ids"][b, seen].tolist(), target))
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("size", "shared_length", "replicas"), [(1, 0, 1), (4, 10, 1), (3, 100, 2), (100, 100, 7)])
def test_every_target_is_predicted_once_from_what_stands_before_it(
    seed: int, size: int, shared_length: int, replicas: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches_module, "_LARGEST_SHARE", 1.0)
    rows = random_rows(seed)
    batches = scoring_batches(rows, size=size, pad_id=7, shared_length=shared_length, replicas=replicas)
    assert len(batches) >= replicas
    assert any("segments" in batch for batch in batches) == (shared_length > 0)
    found: dict[int, Any] = {}
    for batch in batches:
        assert not found.keys() & set(batch["row"].tolist())
        assert bool((batch["predictor"].diff() > 0).all())
        found |= read_back(batch)
    for index, row in enumerate(rows):
        tokens = row.tokens.tolist()
        assert found[index] == [(tokens[:k], tokens[k]) for k in range(1, len(tokens)) if row.labelled[k]]


def test_shared_rows_hold_the_prompt_once_and_no_more_tokens_than_fit() -> None:
    rows = [encoded([1, 2, 3, 4, k, 5], [False] * 4 + [True] * 2, item=0) for k in range(6, 11)]
    packed = list(pack_rows(rows, 100))
    assert [(pack.branches, pack.trunk, pack.length) for pack in packed] == [(((0,), (1,), (2,), (3,), (4,)), 4, 14)]
    packed = list(pack_rows(rows, 8))
    assert [(pack.trunk, pack.length) for pack in packed] == [(4, 8), (4, 8), (0, 6)]
    assert [pack.branches for pack in packed] == [((0,), (1,)), ((2,), (3,)), ((4,),)]
    assert [pack.trunk for pack in pack_rows(rows, 7)] == [0] * 5  # no two branches fit


def test_prompts_that_save_little_are_not_shared() -> None:
    long = [encoded([1, *range(k, k + 9)], [False] + [True] * 9, item=0) for k in (2, 3)]
    assert [pack.trunk for pack in pack_rows(long, 100)] == [0, 0]  # 19 tokens instead of 20


@pytest.mark.parametrize("shared_length", [0, 100])
def test_equal_rows_of_an_item_are_computed_once_and_so_tie(shared_length: int) -> None:
    rows = [encoded([1, 2, 3, 4, k], [False] * 4 + [True], item=0) for k in (5, 6, 5)]
    batches = scoring_batches(rows, size=9, pad_id=0, shared_length=shared_length)
    (batch,) = batches
    assert int(batch["attention_mask"].sum()) == (6 if shared_length else 10)
    assert batch["row"].tolist() == [0, 2, 1]
    assert batch["target_at"][0] == batch["target_at"][1]


def test_a_trunk_holds_no_labelled_token() -> None:
    rows = [encoded([1, 2, 3, 4, k], [False, False, True, True, True], item=0) for k in (5, 6, 7)]
    assert [pack.trunk for pack in pack_rows(rows, 100)] == [2]


@pytest.mark.parametrize("seed", range(20))
def test_cuts_cost_least_among_all_cuts(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = sorted(rng.integers(1, 200, 9).tolist(), reverse=True)
    budget, most = int(rng.integers(100, 900)), int(rng.integers(1, 10))

    def cost(ends: tuple[int, ...]) -> float:
        total = 0.0
        for first, last in itertools.pairwise((0, *ends, len(lengths))):
            padded = (last - first) * lengths[first]
            if last - first > most or (padded > budget and last - first > 1):
                return np.inf
            total += padded + 256
        return total

    inner = range(1, len(lengths))
    least = min(cost(ends) for n in range(len(lengths)) for ends in itertools.combinations(inner, n))
    cuts = cheapest_cuts(lengths, budget=budget, most=most)
    assert [cut.start for cut in cuts[1:]] == [cut.stop for cut in cuts[:-1]]
    assert cuts[-1].stop == len(lengths)
    assert cost(tuple(cut.stop for cut in cuts[:-1])) == least


def test_batches_are_made_once_and_anew_for_another_tokenizer(
    write: Write, tokenizer: Any, bare_tokenizer: Any
) -> None:
    data = TextData(test=write("test.jsonl", [{"text": "the dog barks"}] * 3))
    data.attach(tokenizer)
    first = data.scoring_batches("test")
    assert data.scoring_batches("test") is first
    assert next(iter(data.test_dataloader())) is first[0]
    data.attach(bare_tokenizer)
    assert data.scoring_batches("test")[0]["input_ids"][0, 0] != first[0]["input_ids"][0, 0]


def test_no_replica_goes_without_a_batch(write: Write, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = TextData(test=write("test.jsonl", [{"text": text} for text in ("the", "dog barks", "red green")]))
    data.attach(tokenizer)
    seen = []
    for rank in range(5):
        monkeypatch.setattr(data, "trainer", SimpleNamespace(global_rank=rank, world_size=5))
        batches = data.scoring_batches("test")
        assert len(batches) == 1
        seen += batches[0]["row"].tolist()
    assert set(seen) == {0, 1, 2}


def in_a_trainer(data: Any, folder: Path) -> tuple[Any, dict[str, float], list[Any]]:
    """Module, metrics and predictions of the commands `qratk test` and `qratk predict` on a model directory."""
    from lightning import Trainer

    from qratk.training.module import FineTuneModule
    from qratk.training.trainers import quiet_lightning

    module = FineTuneModule(str(folder), "16:4")
    module.setup("test")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in module.backbone.trainable_parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    with quiet_lightning():
        trainer = Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False,
        )  # fmt: skip
        (metrics,) = trainer.test(module, datamodule=data, verbose=False)
        predictions: Any = trainer.predict(module, datamodule=data)
    return module, metrics, predictions


def assert_a_run_equals_lm_eval(data: Any, folder: Path, tokenizer: Any, tasks: Path) -> None:
    write_task(tasks, "same_items", data)
    module, metrics, predictions = in_a_trainer(data, folder)
    assert any("segments" in batch for batch in data.scoring_batches("test", shared_length=module.shared_length))
    with module.backbone.stored_precision():
        results = run_lm_eval(
            module.backbone.model, tokenizer, ["same_items"], task_folders=[tasks], log_samples=True,
            max_length=data.max_length - 1,
        )  # fmt: skip
    rows = torch.cat([batch["row"] for batch in predictions])
    values = torch.cat([batch["log_likelihood"] for batch in predictions])[rows.argsort()]
    samples = sorted(results["samples"]["same_items"], key=lambda sample: sample["doc_id"])
    theirs = [value[0] for sample in samples for value in sample["filtered_resps"]]
    np.testing.assert_allclose(values.numpy(), theirs, rtol=2e-5, atol=2e-5)
    for metric in ("acc", "acc_norm"):
        expected = results["results"]["same_items"][f"{metric},none"]
        assert metrics[f"test/{metric}"] == pytest.approx(expected, abs=1e-7)  # logged in float32


def words(rng: np.random.Generator, low: int, high: int) -> str:
    return " ".join(rng.choice(["the", "quick", "brown", "fox", "dog barks", "green"], rng.integers(low, high)))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, model: Any, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # lm-eval's dependencies
@pytest.mark.usefixtures("datasets_cache")
@pytest.mark.parametrize("blank", [False, True])
def test_a_run_with_shared_prompts_equals_lm_eval(
    blank: bool, write: Write, model_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    rng = np.random.default_rng(2)
    rows = [
        {
            "question": f"{words(rng, 4, 9)} _ {words(rng, 2, 4)}" if blank else words(rng, 4, 12),
            "choices": [f"{words(rng, 1, 4)} {k}" for k in range(2 + index % 3)],
            "label": index % 2,
        }
        for index in range(20)
    ]
    data = MultipleChoiceData(test=write("test.jsonl", rows), eval_batch_size=7)
    assert_a_run_equals_lm_eval(data, model_folder, tokenizer, tmp_path / "tasks")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # lm-eval's dependencies
@pytest.mark.usefixtures("datasets_cache")
@pytest.mark.parametrize("name", ["trec", "arc_easy", "winogrande"])
def test_a_run_equals_lm_eval_on_real_items(name: str, shared: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = shared / "models" / "stories260k"
    test = str(shared / "datasets" / name / "test.jsonl")
    data = MultipleChoiceData(test=test, max_test_items=100, eval_batch_size=32)
    assert_a_run_equals_lm_eval(data, folder, AutoTokenizer.from_pretrained(folder), tmp_path / "tasks")


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_figures_with_and_without_shared_prompts_agree(write: Write, model_folder: Path) -> None:
    rng = np.random.default_rng(5)
    rows = [{"question": words(rng, 4, 12), "choices": ["red", "blue", "the fox"], "label": k % 3} for k in range(30)]
    figures = []
    for share in (True, False):
        data = MultipleChoiceData(test=write("test.jsonl", rows), share_prompts=share)
        module, metrics, _ = in_a_trainer(data, model_folder)
        assert module.configuration == Configuration.uniform(16, 4, 2)
        figures.append(metrics)
        (batches,) = data._batches._kept.values()
        assert any("segments" in batch for batch in batches) == share
    assert figures[0] == pytest.approx(figures[1], rel=1e-6)
    assert all(figures[0][f"test/{name}"] == figures[1][f"test/{name}"] for name in ("acc", "acc_norm"))
