from __future__ import annotations

import itertools
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qratk.core import DataError
from qratk.data import InstructionData, MultipleChoiceData, StepSampler, TextData

Write = Callable[[str, list[Any]], str]


def rows(*numbers: int) -> list[dict[str, Any]]:
    return [
        {"id": f"any{n}-{k}", "question": f"one {n} two", "choices": ["red", "green blue"], "label": n % 2}
        for k, n in enumerate(numbers)
    ]


def questions(data: MultipleChoiceData, split: Any) -> list[str]:
    return [item.content[0] for item in data.items(split)]


def make(write: Write, tokenizer: Any, **options: Any) -> MultipleChoiceData:
    data = MultipleChoiceData(
        write("train.jsonl", rows(*range(40), 3, 3, 7)), test=write("test.jsonl", rows(*range(30, 45))), **options
    )
    data.attach(tokenizer)
    return data


class Dummy:
    """Made on demand, so that Lightning is only imported where a Trainer runs."""

    @staticmethod
    def module(tokenizer: Any) -> Any:
        from lightning.pytorch import LightningModule

        class Module(LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.weight = torch.nn.Parameter(torch.zeros(()))
                self.tokenizer = tokenizer
                self.seen: list[list[list[int]]] = []
                self.scored: list[list[int]] = []

            def training_step(self, batch: Any, _: int) -> torch.Tensor:
                self.seen.append(batch["input_ids"].tolist())
                return self.weight

            def validation_step(self, batch: Any, _: int) -> None:
                self.scored.append(batch["row"].tolist())

            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.parameters(), 0.1)

        return Module()

    @staticmethod
    def trainer(**options: Any) -> Any:
        from lightning.pytorch import Trainer

        return Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, **options,
        )  # fmt: skip


def fit(module: Any, data: Any, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning advises on workers and logging
        Dummy.trainer(**options).fit(module, datamodule=data)


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, qratk.data; print([m for m in ('torch', 'lightning', 'transformers') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_splits_are_disjoint_in_content(write: Write, tokenizer: Any) -> None:
    data = make(write, tokenizer, validation_items=10)
    train, validation, test = (set(questions(data, split)) for split in ("train", "validation", "test"))
    assert len(test) == 15
    assert len(data.items("validation")) == 10
    assert not train & validation
    assert not train & test
    assert not validation & test
    assert data.describe()["warnings"][0] == "10 of 43 train rows are also in test: dropped"


def test_a_validation_file_loses_its_test_rows_and_takes_its_own_from_train(write: Write, tokenizer: Any) -> None:
    data = make(write, tokenizer, validation=write("validation.jsonl", rows(1, 2, 31, 60)))
    assert questions(data, "validation") == ["one 1 two", "one 2 two", "one 60 two"]
    assert not {"one 1 two", "one 2 two"} & set(questions(data, "train"))
    assert data.describe()["warnings"] == [
        "1 of 4 validation rows are also in test: dropped",
        "10 of 43 train rows are also in test: dropped",
        "2 of 33 train rows are also in validation: dropped",
    ]


def test_the_split_depends_on_the_seed_only(write: Write, tokenizer: Any) -> None:
    one, same, other = (make(write, tokenizer, validation_items=10, seed=seed) for seed in (1, 1, 2))
    assert questions(one, "validation") == questions(same, "validation") != questions(other, "validation")


def test_subsamples_are_seeded_and_have_the_size_asked_for(write: Write, tokenizer: Any) -> None:
    data = make(write, tokenizer, max_train_items=7, max_validation_items=2, max_test_items=5)
    assert [len(data.items(split)) for split in ("train", "validation", "test")] == [7, 2, 5]
    assert set(questions(data, "test")) < set(questions(make(write, tokenizer), "test"))


def test_a_split_that_leaves_nothing_to_train_on_is_refused(write: Write, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="cannot take 40 validation items off 33"):
        make(write, tokenizer, validation_items=40).items("train")
    data = MultipleChoiceData(write("a.jsonl", rows(1, 2)), test=write("b.jsonl", rows(2, 1)))
    with pytest.raises(DataError, match="every train row is also in the test data"):
        data.items("train")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no data"),
        ({"train": "a.jsonl", "max_length": 1}, "max_length must be at least 2, got 1"),
        ({"train": "a.jsonl", "seed": -1}, "seed must be at least 0, got -1"),
        ({"train": "a.jsonl", "eval_batch_size": 0}, "eval_batch_size must be at least 1, got 0"),
        ({"train": "a.jsonl", "batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"train": "a.jsonl", "max_test_items": 0}, "max_test_items must be at least 1"),
        ({"train": "a.jsonl", "validation_fraction": 1.0}, "validation_fraction must be between"),
        ({"train": "a.jsonl", "blank": "maybe"}, "blank must be"),
        ({"train": "a.jsonl", "score": "f1"}, "score must be"),
    ],
)
def test_impossible_options_are_refused(options: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        MultipleChoiceData(**options)


def test_a_scoring_batch_is_as_large_as_a_training_batch_unless_said() -> None:
    assert TextData("a.jsonl", batch_size=3).eval_batch_size == 3
    assert TextData("a.jsonl", batch_size=3, eval_batch_size=5).eval_batch_size == 5


def test_a_missing_split_and_a_missing_tokenizer_are_named(write: Write, tokenizer: Any) -> None:
    data = MultipleChoiceData(test=write("test.jsonl", rows(1, 2)))
    with pytest.raises(DataError, match="has no tokenizer: call `attach"):
        data.test_dataloader()
    data.attach(tokenizer)
    with pytest.raises(DataError, match="there is no train data: give the option `train`"):
        data.train_dataloader()


def test_scoring_batches_hold_every_row_once_and_pad_at_the_right(write: Write, tokenizer: Any) -> None:
    data = make(write, tokenizer, eval_batch_size=4)
    seen = []
    for batch in data.test_dataloader():
        assert {name: value.dtype for name, value in batch.items()} == dict.fromkeys(batch, torch.int64)
        assert "segments" not in batch
        assert bool((batch["attention_mask"].diff(dim=1) <= 0).all())
        assert bool((batch["input_ids"][batch["attention_mask"] == 0] == data.pad_id).all())
        for row, ids, mask in zip(batch["row"], batch["input_ids"], batch["attention_mask"], strict=True):
            assert ids[mask == 1].tolist() == data.scoring_rows("test")[row].tokens.tolist()
        seen += batch["row"].tolist()
    assert sorted(seen) == list(range(len(data.scoring_rows("test")))) == list(range(30))


def test_padding_falls_back_to_the_end_of_sequence_and_to_zero(write: Write, bare_tokenizer: Any) -> None:
    import copy

    tokenizer = copy.deepcopy(bare_tokenizer)
    data = make(write, tokenizer)
    assert data.pad_id == tokenizer.eos_token_id == 1
    tokenizer.eos_token = None
    assert data.pad_id == 0


def test_training_starts_at_any_batch_and_leaves_the_global_generator_alone(write: Write, tokenizer: Any) -> None:
    data = make(write, tokenizer, batch_size=4)
    whole = [batch["input_ids"].tolist() for batch in itertools.islice(data.train_dataloader(), 25)]
    expected = StepSampler(len(data.training_rows()), 4, data.seed)
    assert whole[0] == data.collate([data.training_rows()[k] for k in expected.batch(0)])["input_ids"].tolist()
    before = torch.get_rng_state()
    data.start_batch = 11
    assert [batch["input_ids"].tolist() for batch in itertools.islice(data.train_dataloader(), 14)] == whole[11:]
    list(data.val_dataloader())
    assert torch.equal(before, torch.get_rng_state())


def test_calibration_batches_are_training_rows_in_an_order_of_their_own(write: Write, tokenizer: Any) -> None:
    data = make(write, tokenizer, batch_size=4)
    batches = data.calibration_batches(3, batch_size=2)
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 2]
    again = make(write, tokenizer, batch_size=4).calibration_batches(3, batch_size=2)
    assert all(torch.equal(a["labels"], b["labels"]) for a, b in zip(batches, again, strict=True))
    first = next(iter(data.train_dataloader()))
    assert batches[0]["input_ids"].tolist() != first["input_ids"][:2].tolist()


def test_the_fingerprint_changes_with_whatever_decides_scores(
    write: Write, tokenizer: Any, bare_tokenizer: Any
) -> None:
    same = {
        make(write, tokenizer, **options).fingerprint()
        for options in ({}, {"eval_batch_size": 3}, {"share_prompts": False})
    }
    assert len(same) == 1
    variants: list[dict[str, Any]] = [
        {"seed": 1}, {"score": "acc"}, {"batch_size": 2}, {"max_length": 20}, {"prompt": "{{question}}"},
        {"max_train_items": 5}, {"max_test_items": 5}, {"validation_items": 2}, {"target_delimiter": ""},
    ]  # fmt: skip
    digests = {make(write, tokenizer, **options).fingerprint() for options in variants} | same
    digests.add(make(write, bare_tokenizer).fingerprint())
    assert len(digests) == len(variants) + 2


def test_the_fingerprint_survives_calls_of_the_tokenizer(write: Write, tokenizer: Any) -> None:
    import copy

    tokenizer = copy.deepcopy(tokenizer)
    before = make(write, tokenizer).fingerprint()
    tokenizer("the dog barks", truncation=True, max_length=3)
    assert make(write, tokenizer).fingerprint() == before


def test_rows_are_never_longer_than_tokenizer_and_model_allow(write: Write, tokenizer: Any) -> None:
    assert make(write, tokenizer).max_length == tokenizer.model_max_length == 256
    assert make(write, tokenizer, max_length=500).max_length == 256
    data = make(write, tokenizer, max_length=100)
    assert data.max_length == 100
    assert max(len(row.tokens) for row in data.scoring_rows("test")) > 5
    data.attach(tokenizer, context_length=5)
    assert data.max_length == 5
    assert max(len(row.tokens) for row in data.scoring_rows("test")) == 5


def test_another_tokenizer_makes_other_rows(write: Write, tokenizer: Any, bare_tokenizer: Any) -> None:
    data = make(write, tokenizer)
    assert data.scoring_rows("test")[0].tokens[0] == tokenizer.bos_token_id
    data.attach(bare_tokenizer)
    assert data.scoring_rows("test")[0].tokens[0] != tokenizer.bos_token_id


def test_the_tokenizer_of_the_module_is_used_in_a_trainer(write: Write, tokenizer: Any) -> None:
    data = make(write, None, validation_items=6, batch_size=4, eval_batch_size=5)
    module = Dummy.module(tokenizer)
    fit(module, data, max_steps=30, num_sanity_val_steps=0, val_check_interval=30, check_val_every_n_epoch=None)
    assert len(module.seen) == 30  # endless: four epochs of the data
    assert sorted(index for batch in module.scored for index in batch) == list(range(12))
    plain = make(write, tokenizer, validation_items=6, batch_size=4)
    assert module.seen == [batch["input_ids"].tolist() for batch in itertools.islice(plain.train_dataloader(), 30)]


def test_another_module_in_a_trainer_gets_rows_of_its_own_tokenizer(
    write: Write, tokenizer: Any, bare_tokenizer: Any
) -> None:
    data, plain = make(write, None, validation_items=6), make(write, bare_tokenizer, validation_items=6)
    fit(Dummy.module(tokenizer), data, max_steps=1, num_sanity_val_steps=0)
    module = Dummy.module(bare_tokenizer)
    fit(module, data, max_steps=1, num_sanity_val_steps=0)
    assert module.seen == [next(iter(plain.train_dataloader()))["input_ids"].tolist()]


def test_epochs_of_a_trainer_continue_the_sequence(write: Write, tokenizer: Any) -> None:
    data = make(write, tokenizer, validation_items=6, batch_size=4)  # 26 rows (one twice in train): 7 batches
    module = Dummy.module(tokenizer)
    fit(module, data, max_epochs=3, limit_val_batches=0)
    per_epoch = -(-len(data.training_rows()) // 4)
    sampler = StepSampler(len(data.training_rows()), 4, data.seed)
    expected = [data.collate([data.training_rows()[i] for i in sampler.batch(k)]) for k in range(3 * per_epoch)]
    assert module.seen == [batch["input_ids"].tolist() for batch in expected]


@pytest.mark.parametrize("kind", [InstructionData, MultipleChoiceData, TextData])
def test_options_of_every_kind_can_be_read_from_a_configuration_file(kind: Any) -> None:
    from jsonargparse import ArgumentParser
    from lightning.pytorch import LightningDataModule

    parser = ArgumentParser()
    parser.add_subclass_arguments(LightningDataModule, "data")
    path = f"qratk.data.{kind.__name__}"
    parsed = parser.parse_object({"data": {"class_path": path, "init_args": {"train": "a.jsonl", "batch_size": 3}}})
    data = parser.instantiate(parsed).data
    assert type(data) is kind
    assert data.batch_size == 3


@pytest.mark.slow
def test_real_files_are_read_and_kept_apart(shared: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories260k")
    folder = shared / "datasets"
    kinds: list[tuple[Any, str]] = [
        (MultipleChoiceData, "trec"), (MultipleChoiceData, "sst2"), (InstructionData, "alpaca_long"),
        (TextData, "stories_lm"),
    ]  # fmt: skip
    for kind, name in kinds:
        test = sorted(path.name for path in (folder / name).iterdir() if not path.name.startswith("train"))[-1]
        data = kind(str(folder / name / "train.jsonl"), test=str(folder / name / test), max_train_items=200)
        data.attach(tokenizer)
        keys = [{item.key for item in data.items(split)} for split in ("train", "validation", "test")]
        assert not keys[0] & keys[1] | keys[0] & keys[2] | keys[1] & keys[2]
        assert data.describe()["train"]["items"] == 200
