from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from qratk.core import DataError
from qratk.data import TextData

Write = Callable[[str, list[Any]], str]

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "It was a bright cold day, and the clocks were striking thirteen; the dog barks, the fox jumps, hello world.",
    "Blue.",
    "One two three four five six seven: red green blue? Yes, no, maybe.",
]


def make(write: Write, tokenizer: Any, **options: Any) -> TextData:
    rows = [{"text": text} for text in TEXTS]
    data = TextData(write("train.jsonl", rows), test=write("test.jsonl", [{"text": t + "!"} for t in TEXTS]), **options)
    data.attach(tokenizer)
    return data


@pytest.mark.parametrize("limit", [2, 7, 16, 256])
@pytest.mark.parametrize("stride", [None, 1, 5])
def test_every_token_of_a_document_is_scored_once(write: Write, tokenizer: Any, limit: int, stride: int | None) -> None:
    data = make(write, tokenizer, max_length=limit, stride=stride)
    for index, text in enumerate(TEXTS):
        rows = [row for row in data.scoring_rows("test") if row.item == index]
        assert all(len(row.tokens) <= limit and not row.labelled[0] for row in rows)
        scored = np.concatenate([row.tokens[row.labelled] for row in rows])
        assert tokenizer.decode(scored) == f"{text}!</s>"


@pytest.mark.parametrize(("limit", "stride"), [(16, 4), (16, None), (256, None)])
def test_score_is_minus_nats_per_token_of_a_plain_loop(
    write: Write, tokenizer: Any, model: Any, scored: Any, limit: int, stride: int | None
) -> None:
    data = make(write, tokenizer, max_length=limit, stride=stride, eval_batch_size=3)
    total, counts, means = 0.0, [], []
    for text in TEXTS:
        ids = [*tokenizer.encode(text + "!"), tokenizer.eos_token_id]
        values = []
        done, step = 1, stride or limit - 1
        while done < len(ids):
            end = min(len(ids), limit if done == 1 else done + step)
            begin = max(0, end - limit)
            with torch.no_grad():
                log_p = model(input_ids=torch.tensor([ids[begin:end]])).logits[0].double().log_softmax(-1)
            values += [float(log_p[k - begin - 1, ids[k]]) for k in range(done, end)]
            done = end
        total += sum(values)
        counts.append(len(values))
        means.append(sum(values) / len(values))
    scorer = scored(data, model)
    assert float(scorer.compute()["score"]) == pytest.approx(total / sum(counts), rel=1e-5)
    assert scorer.outcomes().tolist() == pytest.approx(means, rel=1e-5)
    assert list(data.item_weights("test")) == counts


def test_packed_documents_keep_a_token_that_one_ends_with_and_the_next_begins_with(
    write: Write, bare_tokenizer: Any
) -> None:
    tokenizer = copy.deepcopy(bare_tokenizer)
    tokenizer.eos_token = None
    data = TextData(write("train.jsonl", [{"text": f"a{c}a"} for c in "123456"]), max_length=64, validation_items=1)
    data.attach(tokenizer)
    (block,) = data.training_rows()
    alone = [tokenizer.encode(item.content) for item in data.items("train")]
    assert len({ids[0] for ids in alone} | {ids[-1] for ids in alone}) == 1  # each might be taken for the other
    assert sorted(block.tokens.tolist()) == sorted(token for ids in alone for token in ids)


@pytest.mark.parametrize("same", [True, False])
def test_packed_blocks_hold_every_document_once(write: Write, tokenizer: Any, bare_tokenizer: Any, same: bool) -> None:
    # Without a beginning of sequence, one token both ends and begins a document.
    tokenizer = bare_tokenizer if same else tokenizer
    data = make(write, tokenizer, max_length=10, validation_items=1)
    rows = data.training_rows()
    assert {len(row.tokens) for row in rows[:-1]} == {10}
    text = tokenizer.decode(np.concatenate([row.tokens for row in rows]))
    begin = "</s>" if same else "<s>"
    kept = [item.content for item in data.items("train")]
    parts = text.removesuffix("</s>").split("</s>" if same else "</s><s>")
    assert sorted(part.removeprefix(begin) for part in parts if part) == sorted(kept)
    # Everything is learnt but the beginnings of documents.
    unlearnt = np.concatenate([row.tokens[~row.labelled] for row in rows])
    assert tokenizer.decode(unlearnt) == begin * (1 if same else len(kept))


def test_blocks_of_single_documents_never_mix_them(write: Write, tokenizer: Any) -> None:
    data = make(write, tokenizer, max_length=12, packing=False, validation_items=1)
    rows = data.training_rows()
    starts = [row for row in rows if row.tokens[0] == tokenizer.bos_token_id]
    assert len(starts) == len(data.items("train"))
    assert all(tokenizer.bos_token_id not in row.tokens[1:] for row in rows)


def test_the_end_token_can_be_left_out(write: Write, tokenizer: Any) -> None:
    rows = make(write, tokenizer, end_token=False).scoring_rows("test")
    assert tokenizer.decode(rows[0].tokens) == f"<s>{TEXTS[0]}!"


def test_empty_texts_are_named_with_file_and_line(write: Write, tokenizer: Any) -> None:
    data = TextData(test=write("test.jsonl", [{"text": "a"}, {"text": " \n"}]))
    with pytest.raises(DataError, match=r"test\.jsonl, line 2: the row has an empty text"):
        data.items("test")
