from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qratk.backbone.logits import labelled_logits, replicate, target_log_likelihood
from qratk.core import DataError
from qratk.data import InstructionData, MultipleChoiceData, SuiteData, TextData, write_task
from qratk.data.batches import pack_rows
from qratk.data.lm_eval import run_lm_eval
from qratk.data.task import ShotStyle

Write = Callable[[str, list[Any]], str]


def questions(*numbers: int, blank: bool = False) -> list[dict[str, Any]]:
    text = "one _ two {} three" if blank else "What is {}?"
    return [{"question": text.format(n), "choices": ["red", "green blue", "yes"], "label": n % 3} for n in numbers]


def answers(*numbers: int, **fields: Any) -> list[dict[str, Any]]:
    return [{"instruction": f"two and {n}", "output": f"dog {n}", **fields} for n in numbers]


def suite(tokenizer: Any, data: Any, **options: Any) -> SuiteData:
    made = SuiteData(validation={"task": {"data": data, "shots": 2, **options}})
    made.attach(tokenizer, context_length=256)
    return made


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # lm-eval's dependencies
@pytest.mark.usefixtures("datasets_cache")
@pytest.mark.parametrize("blank", [False, True])
def test_prompts_and_likelihoods_are_those_of_lm_eval(
    blank: bool, write: Write, tokenizer: Any, model: Any, scored: Callable[..., Any], tmp_path: Path
) -> None:
    rows = write("v.jsonl", questions(*range(7), blank=blank)), write("t.jsonl", questions(*range(7, 12), blank=blank))
    member = MultipleChoiceData(validation=rows[0], train=rows[1])
    data = suite(tokenizer, member, description="Answer.\n\n", fewshot_delimiter="\n---\n", metric="acc_norm")
    shown = data.examples("validation", "task")
    assert len(shown) == 2
    scorer = scored(data, model, "validation", shared_length=128)
    style = ShotStyle("Answer.\n\n", "\n---\n")
    write_task(tmp_path / "tasks", "same", member, split="validation", examples=shown, style=style)
    results = run_lm_eval(
        model, tokenizer, ["same"], task_folders=[tmp_path / "tasks"], log_samples=True, max_length=255
    )  # fmt: skip
    samples = sorted(results["samples"]["same"], key=lambda sample: sample["doc_id"])
    prompts = [tuple(pair) for sample in samples for pair in sample["arguments"]]
    ours = [pair for item in member.items("validation") for pair in member.choices(item).pairs]
    assert prompts == ours
    assert prompts[0][0].startswith("Answer.\n\n")
    assert prompts[0][0].count("\n---\n") == 2
    theirs = [value[0] for sample in samples for value in sample["filtered_resps"]]
    np.testing.assert_allclose(scorer.log_likelihood.numpy(), theirs, rtol=2e-5, atol=2e-5)
    assert float(scorer.compute()["score"]) == pytest.approx(results["results"]["same"]["acc_norm,none"])


def test_an_item_is_never_its_own_example(write: Write, tokenizer: Any) -> None:
    rows = write("v.jsonl", questions(*range(6)))
    more = write("m.jsonl", questions(3, 4, 8, 9))
    data = suite(tokenizer, MultipleChoiceData(validation=rows), examples=more)
    assert {item.content[0] for item in data.examples("validation", "task")} == {"What is 8?", "What is 9?"}
    with pytest.raises(DataError, match=r"validation\.task: 3 shots, but there are 2 rows .* not scored themselves"):
        suite(tokenizer, MultipleChoiceData(validation=rows), examples=more, shots=3).setup("validate")


def test_validation_and_test_show_the_same_examples_by_seed(write: Write, tokenizer: Any) -> None:
    def shown(seed: int) -> list[list[str]]:
        files = {"train": write("m.jsonl", questions(*range(20, 60)))}
        tasks: dict[str, Any] = {
            split: {
                "task": {
                    "data": MultipleChoiceData(**files, **{split: write(f"{split}.jsonl", questions(k, k + 1))}),
                    "shots": 3,
                }
            }
            for k, split in ((0, "validation"), (5, "test"))
        }
        data = SuiteData(**tasks, seed=seed)
        data.attach(tokenizer, context_length=256)
        return [[item.content[0] for item in data.examples(split, "task")] for split in ("validation", "test")]

    (validation, test), again, other = shown(0), shown(0), shown(1)
    assert validation == test == again[0]
    assert validation != other[0]


def decoded(data: SuiteData, tokenizer: Any) -> tuple[str, str]:
    """The first row's text, and the part of it that is scored."""
    row = data.scoring_rows("validation")[0]
    return tokenizer.decode(row.tokens), tokenizer.decode(row.tokens[row.labelled])


def test_instructions_are_shown_as_text_where_there_is_no_chat_template(write: Write, tokenizer: Any) -> None:
    files = {"validation": write("v.jsonl", answers(1)), "train": write("t.jsonl", answers(5, 6))}
    data = suite(tokenizer, InstructionData(**files, template="plain"), description="Say it.\n")
    text, scored = decoded(data, tokenizer)
    assert text == "<s>Say it.\ntwo and 5\ndog 5\n\ntwo and 6\ndog 6\n\ntwo and 1\ndog 1</s>"
    assert scored == "dog 1</s>"


def test_instructions_are_earlier_turns_of_a_chat_template(write: Write, chat_tokenizer: Any) -> None:
    files = {"validation": write("v.jsonl", answers(1)), "train": write("t.jsonl", answers(5))}
    data = suite(chat_tokenizer, InstructionData(**files), description="Say it.", shots=1)
    text, scored = decoded(data, chat_tokenizer)
    turns = ["system\nSay it.", "user\ntwo and 5", "assistant\ndog 5", "user\ntwo and 1", "assistant\ndog 1"]
    assert text == "".join(f"<|turn|>{turn}<|end|>\n" for turn in turns)
    assert scored == "dog 1<|end|>"


def test_examples_that_cannot_stand_before_others_are_refused(write: Write, chat_tokenizer: Any) -> None:
    told = {"validation": write("v.jsonl", answers(1)), "train": write("t.jsonl", answers(5, 6, system="Be kind."))}
    with pytest.raises(DataError, match=r"t\.jsonl, line 1: a row with tools or a message of the system"):
        suite(chat_tokenizer, InstructionData(**told)).setup("validate")
    files = {"validation": write("v.jsonl", answers(1, system="Be.")), "train": write("t.jsonl", answers(5, 6))}
    with pytest.raises(DataError, match=r"a message of the system beside `description`"):
        suite(chat_tokenizer, InstructionData(**files), description="x").setup("validate")
    texts = {"validation": write("x.jsonl", [{"text": "a"}]), "train": write("y.jsonl", [{"text": "b"}, {"text": "c"}])}
    with pytest.raises(DataError, match="TextData shows no examples before its items"):
        suite(chat_tokenizer, TextData(**texts)).setup("validate")


@pytest.mark.parametrize("kind", ["choices", "blank", "instructions"])
@pytest.mark.parametrize("size", [1, 8])
def test_examples_are_computed_once_for_several_items(
    kind: str, size: int, write: Write, tokenizer: Any, model: Any, scored: Callable[..., Any]
) -> None:
    made = answers if kind == "instructions" else lambda *numbers: questions(*numbers, blank=kind == "blank")
    files = {"validation": write("v.jsonl", made(*range(9))), "train": write("t.jsonl", made(*range(20, 30)))}
    member = InstructionData(**files, template="plain") if kind == "instructions" else MultipleChoiceData(**files)
    other = MultipleChoiceData(validation=write("o.jsonl", questions(*range(40, 44))))  # without examples
    data = SuiteData(validation={"shown": {"data": member, "shots": 4}, "bare": {"data": other}}, eval_batch_size=size)
    data.attach(tokenizer, context_length=256)
    alone, together = (scored(data, model, "validation", shared_length=length) for length in (0, 256))
    torch.testing.assert_close(together.log_likelihood, alone.log_likelihood, rtol=1e-4, atol=1e-4)
    assert (together.seen == 1).all()
    batches = data.scoring_batches("validation", shared_length=256)
    tokens = [sum(int(b["attention_mask"].sum()) for b in data.scoring_batches("validation", shared_length=n))
              for n in (0, 256)]  # fmt: skip
    if size == 1:  # a batch of one row has no room for two items
        return
    assert tokens[1] < (0.35 if kind == "choices" else 0.5) * tokens[0]
    assert any("parents" in batch for batch in batches)
    for batch in (batch for batch in batches if "parents" in batch):
        twice = replicate(batch, 2)
        whole, one = (target_log_likelihood(labelled_logits(model, b), b)[0] for b in (twice, batch))
        torch.testing.assert_close(whole, one.repeat(2), rtol=1e-4, atol=1e-4)


def test_items_that_do_not_fit_together_are_packed_by_themselves(write: Write, tokenizer: Any) -> None:
    files = {"validation": write("v.jsonl", questions(*range(6))), "train": write("t.jsonl", questions(*range(9, 30)))}
    data = suite(tokenizer, MultipleChoiceData(**files), shots=4)
    rows = data.scoring_rows("validation")
    longest = max(len(row.tokens) for row in rows)
    plain = list(pack_rows(rows, 256))
    assert list(pack_rows(rows, 256, groups=[0] * 6, together=longest)) == plain
    assert list(pack_rows(rows, 256, groups=[-1] * 6)) == plain
    packs = list(pack_rows(rows, 256, groups=[0] * 6))
    assert max(pack.length for pack in packs) <= 256
    assert sorted(index for pack in packs for branch in pack.branches for index in branch) == list(range(len(rows)))
    assert len(packs) < len(plain)
