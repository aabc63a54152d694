from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from qratk.core import DataError
from qratk.data import InstructionData, MultipleChoiceData, SuiteData, SuiteTask, TextData, TrainingSource

Write = Callable[[str, list[Any]], str]


def questions(*numbers: int) -> list[dict[str, Any]]:
    return [
        {"id": f"q{k}", "question": f"one {n} two", "choices": ["red", "green blue"], "label": n % 2}
        for k, n in enumerate(numbers)
    ]


def answers(*numbers: int) -> list[dict[str, Any]]:
    return [{"instruction": f"two and {n}", "output": f"the dog barks {n}"} for n in numbers]


def mixed(write: Write, tokenizer: Any, **options: Any) -> SuiteData:
    """Instructions and choices to train on; choices and answers to be judged by."""
    given: dict[str, Any] = {
        "train": [
            {"data": InstructionData(write("a.jsonl", answers(*range(12))), template="alpaca"), "weight": 1},
            {"data": MultipleChoiceData(write("q.jsonl", questions(*range(30)))), "weight": 3},
        ],
        "validation": {
            "choice": {
                "data": MultipleChoiceData(validation=write("v.jsonl", questions(*range(20, 40)))),
                "items": 12,
                "metric": "acc",
                "weight": 2,
            },
            "answer": {"data": InstructionData(validation=write("w.jsonl", answers(5, 30, 31)), template="alpaca")},
        },
        "test": {"choice": {"data": MultipleChoiceData(test=write("t.jsonl", questions(*range(35, 60)))), "items": 9}},
        "batch_size": 4,
    }
    data = SuiteData(**{**given, **options})
    data.attach(tokenizer, context_length=256)
    return data


def texts(data: SuiteData, split: Any) -> list[str]:
    """The question or instruction of every item."""
    contents = [item.content.content for item in data.items(split)]
    return [content[0] if isinstance(content, tuple) else content.messages[0]["content"] for content in contents]


def test_no_row_is_in_two_splits_and_what_was_dropped_is_said(write: Write, tokenizer: Any) -> None:
    data = mixed(write, tokenizer)
    train, validation, test = (set(texts(data, split)) for split in ("train", "validation", "test"))
    assert len(data.items("test")) == 9
    assert len(data.items("validation")) == 12 + 3
    assert not train & validation
    assert not train & test
    assert not validation & test
    assert "two and 5" not in train
    notes = data.describe()["warnings"]
    shared = sum(n in range(20, 30) for n in (int(text.split()[1]) for text in validation if text.startswith("one")))
    assert notes[0] == "tasks of validation that test does not have: answer"
    assert "1 of 12 rows of train[0] are also in validation: dropped" in notes
    assert f"{shared} of 30 rows of train[1] are also in validation: dropped" in notes


def test_a_row_is_found_again_under_another_prompt_and_kind(write: Write, tokenizer: Any) -> None:
    rows = [{**row, "instruction": row["question"], "output": row["choices"][row["label"]]} for row in questions(1, 2)]
    file, other = write("rows.jsonl", rows), write("other.jsonl", questions(3))
    data = mixed(
        write,
        tokenizer,
        train=[
            {"data": InstructionData([file, write("more.jsonl", answers(7))], template="plain")},
            {"data": MultipleChoiceData([file, other], prompt="{{ question }}?")},
        ],
        validation={"choice": {"data": MultipleChoiceData(validation=file)}},
        test=None,
    )
    assert texts(data, "train") == ["two and 7", "one 3 two?"]


def test_sources_are_mixed_by_weight(write: Write, tokenizer: Any) -> None:
    data = mixed(write, tokenizer)
    assert data.mixture is not None
    assert data.mixture.weights == (1.0, 3.0)
    rows = data.training_rows()
    assert sum(data.mixture.sizes) == len(rows)
    batches = iter(data.train_dataloader().batch_sampler)
    drawn = [data.items("train")[rows[index].item].member for _ in range(64) for index in next(batches)]
    assert (drawn.count(0), drawn.count(1)) == (64, 192)


def test_without_weights_every_row_counts_alike(write: Write, tokenizer: Any) -> None:
    sources = [
        TrainingSource(InstructionData(write("a6.jsonl", answers(*range(6))), template="alpaca"), items=3),
        TrainingSource(MultipleChoiceData(write("q8.jsonl", questions(*range(8))))),
    ]
    data = mixed(write, tokenizer, train=sources, validation=None, test=None)
    assert data.mixture is None
    batches = iter(data.train_dataloader().batch_sampler)
    assert sorted(index for _ in range(11) for index in next(batches)) == sorted(4 * list(range(11)))


def test_a_missing_weight_beside_others_is_one(write: Write, tokenizer: Any) -> None:
    sources = [
        {"data": InstructionData(write("a.jsonl", answers(*range(6))), template="alpaca"), "weight": 2},
        {"data": MultipleChoiceData(write("q.jsonl", questions(*range(8))))},
    ]
    data = mixed(write, tokenizer, train=sources, validation=None, test=None)
    assert data.mixture is not None
    assert data.mixture.weights == (2, 1.0)


def test_training_goes_on_where_it_stopped_and_refuses_another_mixture(write: Write, tokenizer: Any) -> None:
    def batches(data: SuiteData, start: int, count: int) -> list[torch.Tensor]:
        data.start_batch = start
        loader = iter(data.train_dataloader())
        return [next(loader)["input_ids"] for _ in range(count)]

    data = mixed(write, tokenizer)
    whole = batches(data, 0, 12)
    for one, other in zip(whole[7:], batches(mixed(write, tokenizer), 7, 5), strict=True):
        assert torch.equal(one, other)
    state = data.train_dataloader().state_dict()
    other = mixed(write, tokenizer)
    other.train_dataloader().load_state_dict(state)
    plain = mixed(write, tokenizer, train=[{"data": s.data} for s in mixed(write, tokenizer).training_sources])
    with pytest.raises(DataError, match="mixture 11 x 1"):
        plain.train_dataloader().load_state_dict(state)
    data.replicate = 1
    assert any(not torch.equal(one, other) for one, other in zip(whole, batches(data, 0, 12), strict=True))


def test_rows_are_those_that_the_members_make(write: Write, tokenizer: Any) -> None:
    data = mixed(write, tokenizer)
    rows = data.scoring_rows("validation")
    alone = MultipleChoiceData(validation=write("v.jsonl", questions(*range(20, 40))))
    alone.attach(tokenizer, context_length=256)
    by_question = {alone.items("validation")[row.item].content[0]: row for row in alone.scoring_rows("validation")}
    for row in rows[1:24:2]:  # the second choice of each
        question = data.items("validation")[row.item].content.content[0]
        assert row.tokens.tolist() == by_question[question].tokens.tolist()
    assert [row.item for row in rows] == [index // 2 for index in range(24)] + [12, 13, 14]
    sampled = list(data.encode_scoring(data.sample("validation", 5)))
    assert [row.item for row in sampled] == [0, 0, 1, 1, 2, 2, 3, 3, 4]
    training = list(data.encode_training(data.sample("train", 40)))
    assert sum(len(row.tokens) > 60 for row in training) == pytest.approx(10, abs=6)  # instructions: a quarter


def test_members_have_no_longer_rows_than_the_suite(write: Write, tokenizer: Any) -> None:
    data = mixed(write, tokenizer, max_length=40)
    assert max(len(row.tokens) for split in ("train", "validation", "test") for row in data.rows(split)) <= 40
    assert data.describe()["members"]["train[0]"]["truncated"] == 11
    with pytest.raises(DataError, match=r"validation.text: max_length 64 is above the suite's, 40"):
        mixed(
            write,
            tokenizer,
            max_length=40,
            validation={"text": {"data": TextData(validation=write("x.jsonl", [{"text": "a"}]), max_length=64)}},
        )


def test_validation_is_carved_off_a_task_and_never_off_a_source(write: Write, tokenizer: Any) -> None:
    data = mixed(
        write,
        tokenizer,
        train=[{"data": MultipleChoiceData(write("q.jsonl", questions(*range(30))))}],
        validation={"c": {"data": MultipleChoiceData(write("q.jsonl", questions(*range(30))), validation_items=10)}},
        test=None,
    )
    assert (len(data.items("train")), len(data.items("validation"))) == (20, 10)


def test_the_fingerprint_tells_what_decides_scores(write: Write, tokenizer: Any) -> None:
    def made(**options: Any) -> str:
        task = {"data": MultipleChoiceData(validation=write("v.jsonl", questions(*range(20, 40)))), "items": 12}
        return mixed(write, tokenizer, validation={options.pop("name", "choice"): {**task, **options}}).fingerprint()

    prints = [made(), made(weight=2), made(metric="acc"), made(items=11), made(name="other"), made(description="Hm.")]
    assert prints[0] == made()
    assert len(set(prints)) == 6


def choice(write: Write, **options: Any) -> dict[str, Any]:
    return {"data": MultipleChoiceData(validation=write("v.jsonl", questions(1, 2, 3))), **options}


BAD: dict[str, tuple[Callable[[Write], dict[str, Any]], str]] = {
    "empty": (lambda write: {}, "empty suite"),
    "metric": (
        lambda w: {"validation": {"c": choice(w, metric="accc")}},
        "validation.c: metric must be one of acc, .*acc",
    ),
    "unbounded": (lambda w: {"validation": {"c": choice(w, metric="log_likelihood")}}, "between 0 and 1"),
    "score": (
        lambda w: {
            "validation": {"c": {"data": MultipleChoiceData(validation=w("v.jsonl", questions(1)), score="nats")}}
        },
        r"validation.c: the data's `score`, without a `metric`, must be one of",
    ),
    "weight": (lambda w: {"validation": {"c": choice(w, weight=0)}}, r"validation.c: weight must be above 0, got 0"),
    "items": (lambda w: {"validation": {"c": choice(w, items=0)}}, "validation.c: items must be at least 1"),
    "no data": (lambda w: {"validation": {"c": {"metric": "acc"}}}, "validation.c: there is no `data`"),
    "no module": (lambda w: {"validation": {"c": {"data": "rows.jsonl"}}}, "must be a data module, got 'rows.jsonl'"),
    "option": (lambda w: {"validation": {"c": choice(w, wieght=2)}}, "unknown option 'wieght'.*weight"),
    "name": (lambda w: {"validation": {"a/b": choice(w)}}, "letters, digits, _ and -; got 'a/b'"),
    "split": (lambda w: {"test": {"c": choice(w)}}, "test.c: the task needs the option `test` of its data"),
    "source": (lambda w: {"train": [choice(w)]}, r"train\[0\]: a source to train on needs the option `train`"),
    "source weight": (
        lambda w: {"train": [{"data": MultipleChoiceData(w("q.jsonl", questions(1))), "weight": -1}]},
        r"train\[0\]: weight must be above 0",
    ),
    "a mapping to train on": (lambda w: {"train": {"a": choice(w)}}, "train must be a list"),
    "a list of tasks": (lambda w: {"validation": [choice(w)]}, "validation must name tasks"),
    "shots": (lambda w: {"validation": {"c": choice(w, shots=2)}}, "2 shots need rows to draw them from"),
    "examples": (lambda w: {"validation": {"c": choice(w, examples="x")}}, "`shots` is 0"),
    "fewer": (lambda w: {"validation": {"c": choice(w, items=[3, 2])}}, r"must not become fewer.*got \[3, 2\]"),
    "no rungs": (lambda w: {"validation": {"c": choice(w, items=[])}}, r"items for each rung"),
    "rungs of test": (
        lambda w: {"test": {"c": {"data": MultipleChoiceData(test=w("t.jsonl", questions(1))), "items": [1, 2]}}},
        "test.c: a number of items for each rung is for validation",
    ),
    "in another": (
        lambda w: {"validation": {"c": {"data": SuiteData(validation={"d": choice(w)})}}},
        "SuiteData cannot be a part of a suite",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_refused_before_anything_is_read(write: Write, case: str) -> None:
    options, message = BAD[case]
    with pytest.raises(DataError, match=message):
        SuiteData(**options(write))


def test_one_data_module_in_two_places_is_refused(write: Write) -> None:
    data = MultipleChoiceData(write("q.jsonl", questions(*range(9))))
    with pytest.raises(DataError, match=r"train\[0\] and validation.c are one data module"):
        SuiteData([TrainingSource(data)], validation={"c": SuiteTask(data)})


def test_training_rows_that_are_all_held_out_are_an_error(write: Write, tokenizer: Any) -> None:
    data = mixed(write, tokenizer, train=[{"data": MultipleChoiceData(write("x.jsonl", questions(35)))}], test={
        "c": {"data": MultipleChoiceData(test=write("x.jsonl", questions(35)))}
    })  # fmt: skip
    with pytest.raises(DataError, match=r"train\[0\]: every row is also in the test data"):
        data.setup("fit")


def test_an_error_in_a_row_says_which_part_it_is_in(write: Write, tokenizer: Any) -> None:
    data = mixed(write, tokenizer, validation={"bad": {"data": MultipleChoiceData(validation=write("b.jsonl", [{}]))}})
    with pytest.raises(DataError, match=r"validation\.bad: .*b\.jsonl, line 1: the row needs `choices`"):
        data.setup("validate")


def test_a_trainer_takes_a_suite(write: Write, tokenizer: Any) -> None:
    from lightning.pytorch import LightningModule, Trainer

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.tokenizer = tokenizer
            self.seen: list[int] = []
            self.scored: list[int] = []

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            self.seen.append(len(batch["input_ids"]))
            return self.weight

        def validation_step(self, batch: Any, _: int) -> None:
            self.scored += batch["row"].tolist()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    module, data = Module(), mixed(write, tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning advises on workers and logging
        trainer = Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, max_steps=3, num_sanity_val_steps=0,
        )  # fmt: skip
        trainer.fit(module, datamodule=data)
        trainer.validate(module, datamodule=data, verbose=False)
    assert module.seen == [4, 4, 4]
    assert sorted(module.scored) == list(range(27))
