"""What is exported, as other people's programs serve it: log-probabilities against those of the model.

`make test-clients` installs the programs and runs this. Without it every test is skipped, and says so. A released
model, SmolLM2-135M, is found through QRATK_SMOLLM2.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from clients.asking import Apart, Question, apart, ask
from clients.environments import CLIENTS, Client, NotSetUpError

from qratk.backbone.backbone import Backbone
from qratk.embedded import model_directory, write_dataset
from qratk.exporters.base import exporters
from qratk.exporters.selfcheck import self_check
from qratk.training.module import FineTuneModule

pytestmark = pytest.mark.clients

BITS = (4, 8, 16, 3, 2, 4)
RANKS = (2, 8, 0, 4, 16)
QUANTIZERS = {bits: {"class_path": "affine", "init_args": {"symmetric": bits == 8}} for bits in (2, 3, 4, 8)}
STRINGS = (
    "Hello world, it's 2024!  What's up?\n\n  ok",
    "Ünïcödé — 日本語 and 12345 tabs\tend",
    "def f(x):\n    return x\n",
)


@dataclass(frozen=True)
class Subject:
    """A model at mixed bits and ranks, and its logits in float32 with adapters and without."""

    backbone: Backbone
    question: Question
    tuned: torch.Tensor
    base: torch.Tensor

    def export(self, form: str, folder: Path, **options: object) -> Path:
        """A folder whose own check passed."""
        exporter = exporters.create(form, **options)
        written = exporter.export(self.backbone, folder)
        checked = self_check(exporter, self.backbone, written)
        assert checked is not None
        assert checked.passed
        return written


@pytest.fixture(scope="module", params=["embedded", "SmolLM2-135M"])
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = model_directory() if request.param == "embedded" else os.environ.get("QRATK_SMOLLM2")
    if folder is None:
        pytest.skip("QRATK_SMOLLM2 names no folder of SmolLM2-135M")
    layers = json.loads((Path(folder) / "config.json").read_text())["num_hidden_layers"]
    layout = " ".join(f"{BITS[i % len(BITS)]}:{RANKS[i % len(RANKS)]}" for i in range(layers))
    module = FineTuneModule(str(folder), configuration=layout, quantizers=QUANTIZERS, compute_dtype="float32")
    module.setup("validate")
    backbone = module.backbone
    backbone.model.eval()
    generator = torch.Generator().manual_seed(0)
    state = backbone.adapter_state()
    backbone.load_adapter_state({n: 0.05 * torch.randn(t.shape, generator=generator) for n, t in state.items()})
    rows = write_dataset(tmp_path_factory.mktemp("rows"))["test"].read_text().splitlines()
    text = " ".join(" ".join(v for v in json.loads(row).values() if isinstance(v, str)) for row in rows[:12])
    tokens = torch.tensor(backbone.tokenizer(text)["input_ids"][: 4 * 24]).view(4, 24)
    with torch.no_grad(), backbone.stored_precision():
        tuned = backbone.model(input_ids=tokens).logits.float()
        with backbone.model.disable_adapter():
            base = backbone.model(input_ids=tokens).logits.float()
    return Subject(backbone, Question.likeliest(tokens, tuned), tuned, base)


def client(name: str) -> Client:
    """A client that is set up; the test is skipped where it is not."""
    try:
        _ = CLIENTS[name].python
    except NotSetUpError as error:
        pytest.skip(str(error))
    return CLIENTS[name]


def compared(
    subject: Subject,
    name: str,
    model: Path,
    adapters: list[Path],
    *,
    dtype: str = "float32",
    off: bool = True,
) -> list[Apart]:
    """How far a client is without adapter and with each of those; what an adapter does is seen to be far more."""
    given = [None, *adapters] if off else [*adapters]
    replies, told = ask(client(name), model, subject.question, given, dtype=dtype)
    logits = [subject.base if adapter is None else subject.tuned for adapter in given]
    found = [apart(reply, subject.question, those) for reply, those in zip(replies, logits, strict=True)]
    print(f"{name} {told['versions']}: {'; '.join(map(str, found))}")
    if off and adapters:
        effect = apart(replies[0], subject.question, subject.tuned)
        assert effect.mean > 5 * max(one.mean for one in found)
    return found


def test_transformers_reads_packed_codes_and_adapters_as_they_are(subject, tmp_path):
    folder = subject.export("compressed-tensors", tmp_path / "out", client="transformers")
    for found in compared(subject, "transformers", folder, [folder / "adapter"]):
        assert found.largest < 2e-3
        assert found.agreement == found.positions


def test_vllm_serves_mixed_bits_with_mixed_ranks_and_with_one_rank(subject, tmp_path):
    folder = subject.export("compressed-tensors", tmp_path / "out", client="vllm-cpu")
    padded = subject.export("compressed-tensors", tmp_path / "padded", client="vllm-cpu", pad=True)
    found = compared(subject, "vllm_cpu", folder, [folder / "adapter", padded / "adapter"], dtype="float16")
    for one in found:
        assert one.mean < 0.02
        assert one.agreement >= 0.9 * one.positions


def test_llama_cpp_computes_the_same_model_in_16_bits(subject, tmp_path):
    folder = subject.export("gguf", tmp_path / "out", dense_bits=2)
    for found in compared(subject, "llama_cpp", folder / "model.gguf", [folder / "adapter.gguf"]):
        assert found.mean < 0.02
        assert found.agreement >= 0.95 * found.positions


@pytest.mark.parametrize("exact", [False, True])
def test_llama_cpp_serves_codes_with_mixed_ranks_to_the_rounding_of_activations(subject, tmp_path, exact):
    folder = subject.export("gguf", tmp_path / "out", exact=exact)
    for found in compared(subject, "llama_cpp", folder / "model.gguf", [folder / "adapter.gguf"]):
        assert found.mean < 0.2
        assert found.agreement >= 0.85 * found.positions


def test_llama_cpp_cuts_texts_as_the_tokenizer_does(subject, tmp_path):
    folder = subject.export("gguf", tmp_path / "out")
    question = Question(subject.question.texts[:1], [ids[-1:] for ids in subject.question.wanted[:1]])
    _, told = ask(client("llama_cpp"), folder / "model.gguf", question, strings=STRINGS)
    assert told["tokens"] == [list(subject.backbone.tokenizer(text)["input_ids"]) for text in STRINGS]


@pytest.mark.parametrize("name", ["transformers", "mlx"])
def test_dense_folder_is_the_merged_model(subject, tmp_path, name):
    folder = subject.export("dense", tmp_path / "out", dtype="float32")
    replies, _ = ask(client(name), folder, subject.question)
    found = apart(replies[0], subject.question, subject.tuned)
    assert found.largest < 5e-3
    assert found.agreement == found.positions


def test_peft_adapter_over_its_dequantised_base_is_what_was_trained(subject, tmp_path):
    folder = subject.export("peft", tmp_path / "out", base="dequantised", dtype="float32")
    for found in compared(subject, "transformers", folder / "base", [folder / "adapter"]):
        assert found.largest < 5e-3
        assert found.agreement == found.positions


def test_mlx_serves_mixed_bits_with_the_adapter_padded_to_one_rank(subject, tmp_path):
    folder = subject.export("mlx", tmp_path / "out", dtype="float32")
    for found in compared(subject, "mlx", folder, [folder / "adapter"]):
        assert found.largest < 5e-3
        assert found.agreement == found.positions
