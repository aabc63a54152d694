"""Shared fixtures: tiny random models of nine families, one of them on disk, and data for it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qratk.backbone.backbone import Backbone

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma", "phi", "gpt_neox", "opt", "gpt2")
VOCABULARY = 96


def pytest_configure(config: pytest.Config) -> None:
    """Let pass two warnings that libraries raise by how they use each other, and that we cannot cure."""
    # Importing hqq makes torch warn of its own use of torch.jit.
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
    # PEFT reads an attribute of every model that transformers 5 renamed.
    config.addinivalue_line("filterwarnings", "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Banks of tests never lie in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QRATK_CACHE", str(tmp_path_factory.mktemp("banks")))
        yield


@pytest.fixture(params=("plain", "avx512_bf16"))
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The test runs with bitsandbytes as on a processor without AVX512-BF16, and as on one with it."""
    from processors import imitate

    imitate(request.param, monkeypatch)
    kind: str = request.param
    return kind


@pytest.fixture(scope="module")
def traced_once() -> Iterator[None]:
    """Peaks of equal models are traced once: for tests that need a model's bytes and are not about them."""
    import tracing

    with tracing.traced_once():
        yield


@pytest.fixture(autouse=True)
def _no_process_group_is_left() -> Iterator[None]:
    """A process group that a test leaves behind would make Lightning warn in every later one of the same worker."""
    yield
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def tiny_config(
    family: str,
    *,
    layers: int = 3,
    hidden: int = 64,
    intermediate: int = 128,
    vocabulary: int = VOCABULARY,
    positions: int = 64,
) -> Any:
    """Configuration of a tiny model of a family."""
    from transformers import (
        Gemma2Config,
        GemmaConfig,
        GPT2Config,
        GPTNeoXConfig,
        LlamaConfig,
        MistralConfig,
        MixtralConfig,
        OPTConfig,
        Phi3Config,
        PhiConfig,
        Qwen2Config,
        Qwen2MoeConfig,
        Qwen3Config,
    )

    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    common = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": positions,
        **ends,
    }
    grouped = {**common, "intermediate_size": intermediate, "num_key_value_heads": 2}
    makers: dict[str, Callable[[], Any]] = {
        "llama": lambda: LlamaConfig(**grouped),
        "qwen2": lambda: Qwen2Config(**grouped),
        "qwen3": lambda: Qwen3Config(**grouped, head_dim=hidden // 4),
        "mistral": lambda: MistralConfig(**grouped, sliding_window=None),
        "gemma": lambda: GemmaConfig(**grouped, head_dim=hidden // 4),
        "gemma2": lambda: Gemma2Config(**grouped, head_dim=hidden // 4, query_pre_attn_scalar=hidden // 4),
        "phi3": lambda: Phi3Config(**grouped),
        "mixtral": lambda: MixtralConfig(**grouped, num_local_experts=4, sliding_window=None),
        "qwen2_moe": lambda: Qwen2MoeConfig(
            **grouped, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=intermediate // 2,
            shared_expert_intermediate_size=intermediate,
        ),
        "phi": lambda: PhiConfig(**{**common, "intermediate_size": intermediate}),
        "gpt_neox": lambda: GPTNeoXConfig(**{**common, "intermediate_size": intermediate}),
        "opt": lambda: OPTConfig(**common, ffn_dim=intermediate, word_embed_proj_dim=hidden, dropout=0.0),
        "gpt2": lambda: GPT2Config(
            vocab_size=vocabulary, n_embd=hidden, n_layer=layers, n_head=4, n_positions=positions, n_inner=intermediate,
            attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, **ends,
        ),
    }  # fmt: skip
    return makers[family]()


def make_tiny_model(family: str = "llama", *, seed: int = 0, **sizes: int) -> PreTrainedModel:
    """Tiny random model of a family, in eval mode, with weights that 16 bits (bfloat16) can hold."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, **sizes), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # biases and norms begin at 0 and 1, which tests nothing
                    parameter.add_(0.1 * torch.randn_like(parameter))
                parameter.copy_(parameter.to(torch.bfloat16))
    return model.eval()


def make_quantizers() -> dict[int, Any]:
    """The default quantizer of each bit-width, with small groups."""
    from qratk.quantizers.base import quantizers

    hqq = quantizers.create("hqq", group_size=32)
    return {2: hqq, 3: hqq, 4: quantizers.create("nf4"), 8: quantizers.create("int8"), 16: quantizers.create("none")}


def make_tiny_backbone(family: str = "llama", *, bits: tuple[int, ...] = (), **options: Any) -> Backbone:
    """Backbone of a tiny model, with the bank built at `bits`."""
    from qratk.backbone.backbone import Backbone

    names = ("layers", "hidden", "intermediate", "seed", "vocabulary", "positions")
    sizes = {key: options.pop(key) for key in names if key in options}
    options.setdefault("quantizers", make_quantizers())
    backbone = Backbone.from_model(make_tiny_model(family, **sizes), **options)
    backbone.build_bank(bits)
    return backbone


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., PreTrainedModel]:
    """Factory of tiny random models: `tiny_model("llama", layers=3)`."""
    return make_tiny_model


@pytest.fixture
def tiny_backbone() -> Callable[..., Backbone]:
    """Factory of tiny backbones: `tiny_backbone("llama", bits=(2, 4, 8), granularity="linear")`."""
    return make_tiny_backbone


@pytest.fixture
def tiny_batch() -> dict[str, Any]:
    """Two sequences of 12 tokens, the second padded at the end."""
    import torch

    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(3, VOCABULARY, (2, 12), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 9:] = 0
    input_ids[1, 9:] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Any]) -> Path:
    """A tiny random Llama with a tokenizer of single characters, as a Hugging Face directory."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

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
