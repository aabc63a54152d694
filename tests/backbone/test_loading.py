"""What cannot be loaded, or not as it is, ends in one message that names what is at fault, in a plan as in a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qratk.backbone import loading
from qratk.backbone.backbone import Backbone
from qratk.backbone.loading import load_model, multiplies_bfloat16, resolve_dtype
from qratk.core.errors import UnsupportedModelError


@pytest.fixture
def stored(tiny_model: Callable[..., Any], tmp_path: Path) -> Path:
    tiny_model(layers=1).save_pretrained(tmp_path)
    return tmp_path


def loaded(folder: Path, *, weights: bool = True) -> Any:
    return load_model(str(folder), trust_remote_code=False, weights=weights)


def described(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("weights", [False, True])
def test_a_checkpoint_that_is_quantised_already_is_refused_with_weights_and_without(
    stored: Path, weights: bool
) -> None:
    described(stored, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(UnsupportedModelError, match=r"quantised already .*'bitsandbytes'"):
        loaded(stored, weights=weights)


def test_a_linear_map_with_a_packed_weight_is_refused_by_name(tiny_model: Callable[..., Any]) -> None:
    class Packed(nn.Linear):
        def __init__(self) -> None:
            super().__init__(64, 64, bias=False)
            self.weight = nn.Parameter(torch.ones(64, 64, dtype=torch.int8), requires_grad=False)

    model = tiny_model()
    model.model.layers[1].self_attn.q_proj = Packed()
    with pytest.raises(UnsupportedModelError, match=r"'model.layers.1.self_attn.q_proj' is a .*Packed.*int8"):
        Backbone.from_model(model, quantizers={})


def test_a_linear_map_that_multiplies_otherwise_is_refused_by_name(tiny_model: Callable[..., Any]) -> None:
    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    model = tiny_model()
    model.model.layers[1].mlp.up_proj = Doubled(64, 128, bias=False)
    with pytest.raises(UnsupportedModelError, match=r"mlp.up_proj' is a .*Doubled"):
        Backbone.from_model(model, quantizers={})
    backbone = Backbone.from_model(model, quantizers={}, target_modules=["q_proj", "v_proj"])  # left alone
    assert isinstance(backbone.base.get_submodule("model.layers.1.mlp.up_proj"), Doubled)


@pytest.mark.parametrize("weights", [True, False])
def test_a_file_that_is_cut_off_is_named_with_weights_and_without(stored: Path, weights: bool) -> None:
    path = stored / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UnsupportedModelError, match=r"model\.safetensors is cut off or damaged"):
        loaded(stored, weights=weights)


@pytest.mark.parametrize("weights", [True, False])
def test_a_pointer_in_the_place_of_weights_is_named_with_weights_and_without(stored: Path, weights: bool) -> None:
    (stored / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UnsupportedModelError, match="git lfs pull"):
        loaded(stored, weights=weights)


def test_weights_of_another_shape_are_one_message(stored: Path) -> None:
    described(stored, intermediate_size=96)
    with pytest.raises(UnsupportedModelError, match="cannot be loaded"):
        loaded(stored)


@pytest.mark.parametrize("blocks", [0, -1, 2147483648])
def test_a_number_of_blocks_that_cannot_be_is_refused_before_they_are_made(stored: Path, blocks: int) -> None:
    described(stored, num_hidden_layers=blocks)
    with pytest.raises(UnsupportedModelError, match=f"num_hidden_layers {blocks:,}, but there must be between 1 and"):
        loaded(stored, weights=False)


def test_memory_that_runs_out_is_not_the_models_fault(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    def full(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("unable to mmap 4 bytes from file: Cannot allocate memory (12)")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(RuntimeError, match="Cannot allocate memory"):
        loaded(stored)


def test_a_number_that_is_none_is_blamed_on_the_checkpoint(stored: Path) -> None:
    tensors = load_file(stored / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, stored / "model.safetensors", metadata={"format": "pt"})
    backbone = Backbone.from_model(loaded(stored), quantizers={})
    with pytest.raises(UnsupportedModelError, match=r"'model\.norm\.weight' of the checkpoint holds NaN"):
        backbone.release_reference()


def test_large_weights_that_overflow_a_sum_are_finite(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model(layers=1)
    with torch.no_grad():
        model.lm_head.weight.fill_(3e38)
    assert Backbone.from_model(model, quantizers={}, compute_dtype="float32").digest()


@pytest.mark.parametrize("able", [False, True])
@pytest.mark.parametrize("stored_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_auto_is_bfloat16_on_a_cpu_that_multiplies_it_for_checkpoints_in_it(
    stored_dtype: torch.dtype, able: bool, tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(loading, "multiplies_bfloat16", lambda: able)
    expected = torch.bfloat16 if able and stored_dtype == torch.bfloat16 else torch.float32
    assert resolve_dtype("auto", stored=stored_dtype) == expected
    backbone = Backbone.from_model(tiny_model(layers=1).to(stored_dtype), quantizers={})
    assert backbone.compute_dtype == expected
    assert backbone.fixed_tensors()["model.norm.weight"].dtype == expected


def test_auto_is_bfloat16_on_cuda_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for has_it, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has_it=has_it: has_it)
        assert resolve_dtype("auto", stored=torch.float32) == expected


@pytest.mark.parametrize(
    ("machine", "avx512_bf16", "elsewhere", "expected"),
    [("x86_64", True, True, True), ("AMD64", False, True, False), ("aarch64", False, True, True),
     ("aarch64", True, False, False)],
)  # fmt: skip
def test_products_that_one_dnn_imitates_do_not_count(
    machine: str, avx512_bf16: bool, elsewhere: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16, raising=False)
    operators = SimpleNamespace(_is_mkldnn_bf16_supported=lambda: elsewhere)
    monkeypatch.setattr(torch.ops, "mkldnn", operators, raising=False)
    assert multiplies_bfloat16() is expected


@pytest.mark.parametrize("kind", ["pad", "bos", "eos"])
def test_a_special_token_beyond_the_embedding_is_refused(kind: str, tiny_model: Callable[..., Any]) -> None:
    tokens = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 95}
    Backbone.from_model(tiny_model(), SimpleNamespace(**tokens), quantizers={})
    wrong = SimpleNamespace(**{**tokens, f"{kind}_token_id": 96, f"{kind}_token": "[X]"})
    with pytest.raises(UnsupportedModelError, match=rf"{kind}_token '\[X\]' is number 96.*0 to 95"):
        Backbone.from_model(tiny_model(), wrong, quantizers={})


def mixture(kind: str, **options: Any) -> Any:
    import transformers

    common = {
        "vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "max_position_embeddings": 32, "num_experts_per_tok": 2,
    }  # fmt: skip
    config = getattr(transformers, kind)(**common, **options)
    return transformers.AutoModelForCausalLM.from_config(config)


def test_weights_that_the_bank_cannot_hold_are_counted_and_named() -> None:
    model = mixture("MixtralConfig", num_local_experts=4)
    matrices = sum(p.numel() for p in model.model.layers.parameters() if p.dim() > 1)
    attention = sum(p.numel() for n, p in model.model.layers.named_parameters() if "self_attn" in n)
    backbone = Backbone.from_model(model, quantizers={})
    assert (backbone.coverage.banked, backbone.coverage.total) == (attention, matrices)
    (note,) = backbone.notes
    assert note.startswith(f"{attention:,} of {matrices:,} weights")
    assert "model.layers.*.mlp.experts.gate_up_proj" in note


def test_a_model_whose_matrices_are_all_in_the_bank_has_no_note(tiny_model: Callable[..., Any]) -> None:
    backbone = Backbone.from_model(tiny_model(), quantizers={})
    assert backbone.coverage.banked == backbone.coverage.total == sum(s.parameters for s in backbone.shapes)
    some = Backbone.from_model(tiny_model(), quantizers={}, target_modules="q_proj")
    assert some.coverage.banked < some.coverage.total == backbone.coverage.total
    assert backbone.notes == some.notes == ()


_DEEPSEEK = {
    "moe_intermediate_size": 16, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "qk_nope_head_dim": 8, "first_k_dense_replace": 1,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
def test_projections_that_peft_leaves_out_are_named_and_the_others_can_be_trained() -> None:
    with pytest.raises(UnsupportedModelError, match=r"leaves 6 of the 16 projections.*target_modules=\['kv_a") as error:
        Backbone.from_model(mixture("DeepseekV3Config", **_DEEPSEEK), quantizers={})
    able = str(error.value).split("target_modules=")[1]
    backbone = Backbone.from_model(
        mixture("DeepseekV3Config", **_DEEPSEEK), quantizers={}, target_modules=json.loads(able.replace("'", '"'))
    )
    assert len(backbone.banks) == 10


def test_what_peft_refuses_is_one_message() -> None:
    from transformers import AutoModelForCausalLM, MambaConfig

    config = MambaConfig(vocab_size=32, hidden_size=32, num_hidden_layers=2, state_size=4)
    with pytest.raises(UnsupportedModelError, match=r"PEFT cannot adapt Mamba.*'x_proj'"):
        Backbone.from_model(AutoModelForCausalLM.from_config(config), quantizers={})
