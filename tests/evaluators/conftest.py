"""A tiny model and data to fine-tune it on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Any]) -> Path:
    """A tiny random Llama with a tokenizer of single characters, as a Hugging Face directory."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    vocabulary = {name: index for index, name in enumerate(["<pad>", "<s>", "</s>", "<unk>"])}
    vocabulary |= {chr(code): len(vocabulary) + i for i, code in enumerate(range(32, 124))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Sums to 9 as multiple choice."""
    folder = tmp_path_factory.mktemp("data")
    files = {}
    for name, numbers in (("train", range(5)), ("validation", range(5, 7)), ("test", range(7, 9))):
        rows = [
            {"id": f"{a}{b}", "context": "", "question": f"{a}+{b}=", "choices": ["9", "3"], "label": (a + b) % 2}
            for a in numbers
            for b in range(8)
        ]
        path = folder / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows))
        files[name] = str(path)
    return files
