"""Greedy generation: the tokens of transformers' own, in fewer products."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qratk.data.generation import Prefix, StopSequences, end_ids, generate, plain_greedy
from qratk.data.lm_eval import run_lm_eval
from qratk.embedded.data import model_directory

PROMPTS = ["Who", "The people of the town", "Question: what is 3 + 4?\nAnswer:", "a", "one two three four five six"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_directory(), padding_side="left")


@pytest.fixture(scope="module")
def packed() -> Iterator[Any]:
    """The embedded model on packed weights, with adapters that do something."""
    from qratk import FineTuneModule

    module = FineTuneModule("embedded", configuration="4:4")
    module.setup("validate")
    for name, parameter in module.backbone.trainable_parameters():
        if name.endswith("lora_B.weight"):
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(0))
    return module.backbone.model.eval()


def prompts_of(tokenizer: Any, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    made = tokenizer(texts, return_tensors="pt", padding=True)
    return made["input_ids"], made["attention_mask"]


def expected(model: Any, ids: torch.Tensor, mask: torch.Tensor, most: int, pad: int) -> list[list[int]]:
    with torch.no_grad():
        made = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=most, pad_token_id=pad
        )
    return [row[ids.shape[1] :].tolist() for row in made]


def test_tokens_are_those_of_transformers(packed: Any, tokenizer: Any) -> None:
    ids, mask = prompts_of(tokenizer, PROMPTS)
    theirs = expected(packed, ids, mask, 24, tokenizer.pad_token_id)
    assert len({tuple(row) for row in theirs}) == len(PROMPTS)
    ends = end_ids(packed)
    ours = generate(packed, ids, mask, most=24, ends=ends)
    for own, other in zip(ours, theirs, strict=True):
        assert own == other[: len(own)]
        assert set(other[len(own) :]) <= {tokenizer.pad_token_id}
        assert len(own) == 24 or own[-1] in ends
    for text, own in zip(PROMPTS, ours, strict=True):  # and those of each prompt alone
        assert generate(packed, *prompts_of(tokenizer, [text]), most=24, ends=ends) == [own]


def test_rows_leave_when_they_are_done(packed: Any, tokenizer: Any) -> None:
    ids, mask = prompts_of(tokenizer, PROMPTS)
    whole = generate(packed, ids, mask, most=16)
    assert all(len(row) == 16 for row in whole)
    ends = {whole[1][3], whole[3][0]}
    sizes: list[int] = []
    handle = packed.register_forward_pre_hook(
        lambda _, arguments, options: sizes.append(len(options["input_ids"])), with_kwargs=True
    )
    try:
        ours = generate(packed, ids, mask, most=16, ends=ends)
    finally:
        handle.remove()
    for own, row in zip(ours, whole, strict=True):
        last = next((index for index, token in enumerate(row) if token in ends), 15)
        assert own == row[: last + 1]
    lengths = [len(row) for row in ours]
    assert sizes == [sum(length > step for length in lengths) for step in range(max(lengths))]
    assert sum(lengths) < 5 * 16


def test_a_stop_sequence_may_lie_across_tokens(tokenizer: Any, packed: Any) -> None:
    ids, mask = prompts_of(tokenizer, PROMPTS[:2])
    whole = generate(packed, ids, mask, most=20)
    text = tokenizer.decode(whole[0])
    middle = text[len(text) // 2 - 1 : len(text) // 2 + 2]
    stop = StopSequences(tokenizer, ["never to come", middle])
    ours = generate(packed, ids, mask, most=20, stopped=lambda _, tokens: stop(tokens))
    cut = next(n for n in range(1, 21) if middle in tokenizer.decode(whole[0][:n]))
    assert ours[0] == whole[0][:cut]


def test_candidates_side_by_side_go_on_while_one_does(packed: Any, tokenizer: Any) -> None:
    ids, mask = prompts_of(tokenizer, PROMPTS)
    alone = generate(packed, ids, mask, most=12)
    ends = {alone[2][4]}
    assert generate(packed, ids, mask, most=12, ends=ends, candidates=2) == 2 * generate(
        packed, ids, mask, most=12, ends=ends
    )


@pytest.mark.parametrize("candidates", [1, 2])
def test_what_prompts_begin_with_is_computed_once(packed: Any, tokenizer: Any, candidates: int) -> None:
    begin = tokenizer("The people of the town said to the people: who is it?")["input_ids"]
    ends = [tokenizer.encode(text, add_special_tokens=False) for text in PROMPTS]
    whole, rest = (
        tokenizer.pad({"input_ids": rows}, return_tensors="pt") for rows in ([begin + end for end in ends], ends)
    )
    expected = generate(packed, whole["input_ids"], whole["attention_mask"], most=12, candidates=candidates)
    assert len({tuple(row) for row in expected}) == len(PROMPTS)
    kept, prefix = Prefix(), torch.tensor(begin)
    sizes: list[tuple[int, ...]] = []
    handle = packed.register_forward_pre_hook(
        lambda _, arguments, options: sizes.append(tuple(options["input_ids"].shape)), with_kwargs=True
    )
    try:
        for part in (slice(0, 2), slice(2, None)):
            ids, mask = rest["input_ids"][part], rest["attention_mask"][part]
            found = generate(packed, ids, mask, most=12, candidates=candidates, prefix=prefix, kept=kept)
            numbers = range(len(PROMPTS))[part]
            assert found == [expected[c * len(PROMPTS) + n] for c in range(candidates) for n in numbers]
    finally:
        handle.remove()
    assert sizes[0] == (candidates, len(begin))
    assert (candidates, len(begin)) not in sizes[1:]
    with torch.no_grad():  # another prefix takes the place of the one that is kept
        others = generate(packed, rest["input_ids"], rest["attention_mask"], most=12, prefix=prefix[:4], kept=kept)
    assert others != expected[: len(PROMPTS)]


def test_a_model_that_asks_for_more_than_the_likeliest_token_is_told(packed: Any) -> None:
    from transformers import GenerationConfig

    class Model(torch.nn.Module):
        generation_config = GenerationConfig(repetition_penalty=1.05)

    assert plain_greedy(packed)
    assert not plain_greedy(Model())
    assert not plain_greedy(torch.nn.Linear(2, 2))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # lm-eval's dependencies
@pytest.mark.usefixtures("datasets_cache")
def test_lm_eval_generates_the_same_texts(
    packed: Any, tokenizer: Any, tmp_path: Path, write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write("rows.jsonl", [{"q": text, "a": "yes"} for text in PROMPTS])
    task = {
        "task": "generates", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": rows}},
        "test_split": "test", "output_type": "generate_until", "doc_to_text": "q", "doc_to_target": "a",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 16, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (tmp_path / "generates.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")

    def texts() -> list[str]:
        found = run_lm_eval(
            packed, tokenizer, ["generates"], task_folders=[tmp_path], batch_size=3, log_samples=True
        )["samples"]["generates"]  # fmt: skip
        return [sample["resps"][0][0] for sample in sorted(found, key=lambda sample: sample["doc_id"])]

    ours = texts()
    monkeypatch.setattr("qratk.data.generation.plain_greedy", lambda model: False)
    monkeypatch.setattr("qratk.data.generation.generate", None)
    assert ours == texts()
    assert len(set(ours)) > 1
    assert "." not in "".join(ours)
