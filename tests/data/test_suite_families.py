"""Model families in a suite: choices, few-shot prompts that are shared, and texts, as the plain model has them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from qratk.backbone.logits import shared_length
from qratk.core.configuration import Configuration
from qratk.data import LmEvalData, MultipleChoiceData, SuiteData
from qratk.data.suite_scorer import SuiteScorer
from qratk.exporters.dense import merged_model
from qratk.training.scoring import Scoring

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # lm-eval's dependencies

FAMILIES = ("mixtral", "qwen2_moe", "gemma", "gemma2", "phi3", "gpt_neox", "opt", "gpt2")
MOST = 6


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> SuiteData:
    """Choices behind two examples, and questions that are gone on from behind five."""
    import datasets

    folder = tmp_path_factory.mktemp("suite")
    rows = [
        {"question": f"The dog or two is {n}", "choices": ["red", "green blue", "yes"], "label": n % 3}
        for n in range(14)
    ]
    for name, part in (("test", rows[:8]), ("train", rows[8:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    files = {name: str(folder / f"{name}.jsonl") for name in ("train", "test")}
    task = {
        "task": "texts", "dataset_path": "json", "dataset_kwargs": {"data_files": files}, "training_split": "train",
        "test_split": "test", "output_type": "generate_until", "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[label]}}", "num_fewshot": 5, "fewshot_config": {"sampler": "first_n"},
        "generation_kwargs": {"until": ["\n\n\n"], "max_gen_toks": MOST},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (folder / "texts.yaml").write_text(yaml.safe_dump(task))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        data = SuiteData(
            test={
                "choices": {
                    "data": MultipleChoiceData(files["train"], test=files["test"]), "metric": "acc", "shots": 2,
                },
                "texts": {"data": LmEvalData("texts", task_folders=[str(folder)], validation=None)},
            },
            eval_batch_size=4,
        )  # fmt: skip
        data.attach(tokenizer, context_length=256)
        data.scoring_rows("test")
    return data


def packed(family: str, tiny_backbone: Any) -> Any:
    """A backbone at mixed bits and ranks, with adapters and logits that differ."""
    sizes = {"layers": 2, "hidden": 32, "intermediate": 64, "vocabulary": 384, "positions": 256}
    backbone = tiny_backbone(family, bits=(4, 8), **sizes)
    backbone.activate(Configuration.of([4, 8], [4, 2]), seed=0)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in backbone.trainable_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    backbone.model.eval()
    return backbone


def plain_likelihoods(model: Any, data: SuiteData, rows: Sequence[int]) -> list[float]:
    """Of rows one by one, in whole forward passes."""
    found = []
    for row in rows:
        tokens = torch.from_numpy(data.scoring_rows("test")[row].tokens.astype(np.int64))
        labelled = torch.from_numpy(data.scoring_rows("test")[row].labelled[1:])
        logits = model(input_ids=tokens[None]).logits[0, :-1].float().log_softmax(-1)
        found.append(float(logits.gather(1, tokens[1:, None])[:, 0][labelled].sum()))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_scores_choices_and_texts_as_its_plain_model(
    family: str, suite: SuiteData, tiny_backbone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = packed(family, tiny_backbone)
    rows = suite.scoring_rows("test")
    texts: dict[int, list[int]] = {}
    values = SuiteScorer.text_values

    def noted(self: SuiteScorer, row: int, tokens: Sequence[int]) -> Sequence[float]:
        texts[row] = list(tokens)
        return values(self, row, tokens)

    monkeypatch.setattr(SuiteScorer, "text_values", noted)
    longest = shared_length(backbone.model)
    assert longest >= 256
    batches = suite.scoring_batches("test", shared_length=longest)
    assert any("prefix" in batch for batch in batches)
    assert any("parents" in batch for batch in batches)
    scoring = Scoring()
    scoring.begin(suite, "test", torch.device("cpu"), backbone.stored_precision())
    with torch.no_grad():
        for batch in batches:
            scoring.score(backbone.model, batch)
    (scorer,) = scoring.end()

    plain = merged_model(backbone, dtype=torch.float32).eval()
    choices = [index for index, row in enumerate(rows) if not row.generates]
    asked = [index for index, row in enumerate(rows) if row.generates]
    assert (len(choices), len(asked)) == (24, 8)
    with torch.no_grad():
        expected = plain_likelihoods(plain, suite, choices)
        np.testing.assert_allclose(scorer.log_likelihood[choices].numpy(), expected, rtol=1e-4, atol=1e-4)
        for index in asked:
            prompt = torch.from_numpy(rows[index].tokens.astype(np.int64))[None]
            made = plain.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=MOST,
                pad_token_id=0,
            )[0, prompt.shape[1] :]  # fmt: skip
            assert texts[index] == made.tolist()
    assert len({tuple(text) for text in texts.values()}) > 1
    assert np.ptp(expected) > 1
