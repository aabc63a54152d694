from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

TEXT = [
    "The quick brown fox jumps over the lazy dog. It was a bright cold day, and the clocks were striking thirteen.",
    "### Instruction:\nWrite a response that appropriately completes the request.\n\n### Response:\n",
    "Below is an instruction that describes a task, paired with an input that provides further context.",
    "What is the colour of the sky? Blue. What is two and two? Four. Which animal barks? The dog barks.",
    "hello world, answer the question: yes, no, maybe; red green blue; one two three four five six seven",
]


def build_tokenizer(*, begin: bool, chat: bool = False, end: bool = False) -> Any:
    """Byte-level BPE of some 300 tokens, trained on a few sentences; with or without `<s>` in front, `</s>` behind."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|turn|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT, trainer)
    if begin:
        around = "<s> $A </s>" if end else "<s> $A"
        pairs = [("<s>", 0), ("</s>", 1)]
        backend.post_processor = processors.TemplateProcessing(single=around, special_tokens=pairs)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", model_max_length=256, **({"bos_token": "<s>"} if begin else {})
    )
    if chat:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|end|>"]})
        tokenizer.chat_template = (
            "{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] | trim }}<|end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
        )
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return build_tokenizer(begin=True)


@pytest.fixture(scope="session")
def bare_tokenizer() -> Any:
    return build_tokenizer(begin=False)


@pytest.fixture(scope="session")
def ending_tokenizer() -> Any:
    return build_tokenizer(begin=True, end=True)


@pytest.fixture(scope="session")
def chat_tokenizer() -> Any:
    return build_tokenizer(begin=True, chat=True)


@pytest.fixture(scope="session")
def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=384, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return LlamaForCausalLM(config).eval()


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, list[Any]], str]:
    def write_rows(name: str, rows: list[Any]) -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write_rows


@pytest.fixture(scope="session")
def shared() -> Path:
    folder = os.environ.get("QRATK_SHARED")
    if not folder:
        pytest.skip("QRATK_SHARED is not set")
    return Path(folder)


@pytest.fixture
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keeps what `datasets` writes out of the home directory."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def run_scorer(data: Any, model: Any, split: str = "test", *, shared_length: int = 0) -> Any:
    """A scorer that has seen every batch of a split."""
    from qratk.backbone.logits import labelled_logits, target_log_likelihood

    scorer = data.scorer(split)
    with torch.no_grad():
        for batch in data.scoring_batches(split, shared_length=shared_length):
            scorer.update(batch, *target_log_likelihood(labelled_logits(model, batch), batch))
    return scorer


@pytest.fixture(scope="session")
def scored() -> Callable[..., Any]:
    return run_scorer
