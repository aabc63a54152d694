"""Calibration: moments of inputs, banks fitted to them, and the same weights in a search and in a fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import Files, fitted, make_module
from torch import nn

from qratk.bank.calibration import Calibration, gather, stream_inputs
from qratk.core import Configuration
from qratk.core.errors import DataError, QuantizationError, UnsupportedModelError
from qratk.quantizers.base import quantizers

GPTQ = {"class_path": "gptq", "init_args": {"group_size": 32}}


@pytest.fixture
def files(model_dir: Path, data_files: dict[str, str]) -> Files:
    return Files(str(model_dir), data_files)


def sequences(seed: int = 1, count: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        mask = torch.ones(2, 12, dtype=torch.long)
        mask[1, 9 - number :] = 0
        made.append({"input_ids": torch.randint(3, 96, (2, 12), generator=generator), "attention_mask": mask})
    return made


def chosen(name: str = "gptq", **options: Any) -> dict[int, Any]:
    return {
        2: quantizers.create("hqq", group_size=32),
        4: quantizers.create(name, **{"group_size": 32, **options}),
        16: quantizers.create("none"),
    }


def seen_inputs(model: nn.Module, names: list[str], batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Inputs (tokens, d_in) of each projection of a plain model that runs over one unpadded sequence at a time."""
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: rows[name].append(args[0].detach()[0])
        )
        for name in names
    ]
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            with torch.no_grad():
                model(input_ids=ids[None, : int(mask.sum())])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in rows.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
def test_moments_are_those_of_the_inputs_that_a_plain_model_shows(
    family: str, tiny_model: Callable[..., Any], tiny_backbone: Callable[..., Any]
) -> None:
    backbone, batches = tiny_backbone(family), sequences()
    expected = seen_inputs(tiny_model(family), list(backbone.banks), batches)
    found = gather(backbone.model, backbone.banks, batches)
    for name, x in expected.items():
        moments = found[name]
        assert moments.tokens == len(x) == 12 * 3 + 9 + 8 + 7
        torch.testing.assert_close(moments.second, x.T @ x / len(x), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(moments.magnitude, x.abs().mean(dim=0), rtol=1e-3, atol=1e-5)


def test_projections_that_share_an_input_share_its_moments(tiny_backbone: Callable[..., Any]) -> None:
    backbone = tiny_backbone("llama")
    found = gather(backbone.model, backbone.banks, sequences())
    at = "model.layers.1"
    q, k, v = (found[f"{at}.self_attn.{part}_proj"] for part in "qkv")
    assert q is k is v
    assert found[f"{at}.mlp.gate_proj"] is found[f"{at}.mlp.up_proj"]
    assert found[f"{at}.self_attn.o_proj"] is not q
    assert found["model.layers.2.self_attn.q_proj"] is not q


@pytest.mark.parametrize(("memory", "layers_held"), [("4GiB", 3), ("1KiB", 1), ("400KiB", 2)])
def test_moments_do_not_depend_on_the_memory_for_them(
    tiny_backbone: Callable[..., Any], memory: str, layers_held: int
) -> None:
    backbone = tiny_backbone("llama")  # 6 * 64^2 + 128^2 float32 a layer: 160 KiB
    layers = [dict(layer.modules) for layer in backbone.layers]
    calibration = Calibration(backbone.model, layers, sequences(), memory=memory)
    whole = gather(backbone.model, backbone.banks, sequences())
    calibration.moments(next(iter(layers[0])))
    assert list(calibration._held) == [name for layer in layers[:layers_held] for name in layer]
    for layer in layers:
        for name in layer:
            assert torch.equal(calibration.moments(name).second, whole[name].second)


def test_an_expert_that_no_token_reached_has_moments_of_zeros() -> None:
    class Mixture(nn.Module):
        cut = False

        def __init__(self) -> None:
            super().__init__()
            self.table, self.used, self.idle = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.idle.device = torch.device("cpu")

        def get_input_embeddings(self) -> nn.Embedding:
            return self.table

        def forward(self, input_ids: torch.Tensor, **rest: Any) -> torch.Tensor:
            x = self.table(input_ids)
            return self.used(x[:, :3] if self.cut else x)

    model = Mixture()
    found = gather(model, {"used": model.used, "idle": model.idle}, small_sequences())
    assert found["idle"].tokens == 0
    assert not found["idle"].second.any()
    assert found["used"].tokens == 7
    model.cut = True  # as if a router had chosen
    with pytest.raises(UnsupportedModelError, match="batch size of 1"):
        gather(model, {"used": model.used}, small_sequences())


def small_sequences() -> list[dict[str, torch.Tensor]]:
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    return [{"input_ids": torch.arange(8).reshape(2, 4), "attention_mask": mask}]


def test_no_token_at_all_is_an_error(tiny_backbone: Callable[..., Any]) -> None:
    backbone = tiny_backbone("llama")
    with pytest.raises(DataError, match="padding"):
        stream_inputs(backbone.model, backbone.banks, [], lambda name, x: None)


def test_passes_leave_modes_hooks_and_random_state(tiny_backbone: Callable[..., Any]) -> None:
    backbone = tiny_backbone("llama")
    backbone.model.train()
    state = torch.get_rng_state()
    gather(backbone.model, backbone.banks, sequences())
    assert all(module.training for module in backbone.model.modules())
    assert not any(module._forward_pre_hooks for module in backbone.model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def output_error(backbone: Any, moments: Any) -> float:
    total = 0.0
    for name, bank in backbone.banks.items():
        residual = bank.reference - bank.dequantized(4)
        total += float(((residual @ moments[name].second) * residual).sum())
    return total


@pytest.mark.parametrize(("name", "most"), [("gptq", 0.9), ("awq", 0.97)])  # few channels of a random model stand out
def test_a_calibrated_bank_has_a_smaller_output_error_than_rounding_to_nearest(
    name: str, most: float, tiny_backbone: Callable[..., Any]
) -> None:
    batches = sequences(count=6)
    backbone = tiny_backbone("llama", quantizers=chosen(name))
    moments = gather(backbone.model, backbone.banks, batches)
    backbone.calibrate(batches)
    backbone.build_bank([4])
    fitted_error = output_error(backbone, moments)
    for bank in backbone.banks.values():
        variant = bank.variants[4]
        packed = variant.quantizer.quantize(bank.reference, 4)
        bank.add_variant(4, type(variant)(variant.quantizer, 4, packed))
    assert fitted_error < most * output_error(backbone, moments)


def test_bank_is_packed_from_moments_at_full_precision_whatever_is_active(tiny_backbone: Callable[..., Any]) -> None:
    fresh, used = (tiny_backbone("llama", quantizers=chosen()) for _ in range(2))
    for backbone in (fresh, used):
        backbone.calibrate(sequences())
    used.build_bank([2])
    used.activate(Configuration.uniform(2, 4, 3), seed=0)
    for _, parameter in used.trainable_parameters():
        parameter.data.add_(0.1)  # adapters that change the inputs
    fresh.build_bank([4])
    used.build_bank([4])
    assert [bank.active for bank in used.banks.values()] == [2] * len(used.banks)
    for name, bank in fresh.banks.items():
        packed = used.banks[name].variants[4].packed
        assert all(torch.equal(tensor, packed[part]) for part, tensor in bank.variants[4].packed.items())


def test_moments_are_dropped_once_the_bank_is_built(tiny_backbone: Callable[..., Any]) -> None:
    backbone = tiny_backbone("llama", quantizers=chosen())
    backbone.calibrate(sequences())
    backbone.build_bank([4])
    assert backbone._packer.calibration._held == {}


def test_a_calibrated_quantizer_without_calibration_is_an_error(tiny_backbone: Callable[..., Any]) -> None:
    backbone = tiny_backbone("llama", quantizers=chosen())
    backbone.build_bank([2])
    with pytest.raises(QuantizationError, match=r"gptq.*calibrate"):
        backbone.build_bank([4])


def test_calibrating_again_with_other_sequences_is_an_error_once_the_bank_is_built(
    tiny_backbone: Callable[..., Any],
) -> None:
    backbone = tiny_backbone("llama", quantizers=chosen())
    backbone.calibrate(sequences(seed=2))
    backbone.calibrate(sequences())
    backbone.build_bank([4])
    backbone.calibrate(sequences())
    with pytest.raises(QuantizationError, match="other calibration sequences"):
        backbone.calibrate(sequences(seed=2))


def test_digest_depends_on_the_sequences_only_where_a_quantizer_is_fitted(tiny_backbone: Callable[..., Any]) -> None:
    digests = {}
    for name in ("gptq", "hqq"):
        for seed in (1, 1, 2):
            backbone = tiny_backbone("llama", quantizers=chosen(name))
            before = backbone.digest()
            backbone.calibrate(sequences(seed=seed))
            digests.setdefault(name, []).append(backbone.digest())
            assert (backbone.digest() == before) == (name == "hqq")
    first, again, other = digests["gptq"]
    assert first == again != other
    assert len(set(digests["hqq"])) == 1


def test_store_keeps_banks_of_other_sequences_apart_and_maps_those_of_the_same(
    tiny_backbone: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def built(seed: int, **options: Any) -> Any:
        backbone = tiny_backbone("llama", quantizers=chosen(), bank_dir=tmp_path, **options)
        backbone.calibrate(sequences(seed=seed))
        backbone.build_bank([2, 4])
        return backbone

    def codes(backbone: Any) -> torch.Tensor:
        return torch.cat([bank.variants[4].packed["codes"].flatten() for bank in backbone.banks.values()])

    first, other = built(1), built(2)
    assert not torch.equal(codes(first), codes(other))
    assert len({path.parent for path in tmp_path.rglob("*.safetensors")}) == 3  # 2 bits are the same for both
    monkeypatch.setattr("qratk.bank.calibration.gather", None)  # a mapped bank needs no pass
    assert torch.equal(codes(built(1)), codes(first))


def test_norms_and_embeddings_are_part_of_the_key_of_a_calibrated_bank(
    tiny_backbone: Callable[..., Any], tmp_path: Path
) -> None:
    folders = []
    for shift in (0.0, 0.5):
        backbone = tiny_backbone("llama", quantizers=chosen(), bank_dir=tmp_path)
        backbone.base.get_submodule("model.norm").weight.data.add_(shift)
        backbone.calibrate(sequences())
        backbone.build_bank([2, 4])
        folders.append({path.parent for path in tmp_path.rglob("*.safetensors")})
    assert (len(folders[0]), len(folders[1])) == (2, 3)


def packed_weights(module: Any) -> dict[str, torch.Tensor]:
    banks = module.backbone.banks
    return {f"{n}/{k}": t for n, bank in banks.items() for k, t in bank.variants[4].packed.items()}


def test_a_fit_has_the_weights_of_the_search(files: Files, tmp_path: Path) -> None:
    from tiny_runs import evaluated, opened

    options = {"quantizers": {4: GPTQ}, "calibration_sequences": 12}
    evaluator = opened(tmp_path, files, {"accelerator": "cpu", "devices": 1}, **options)
    (evaluation,) = evaluated(evaluator, 2, "4:2 4:4 4:2")
    assert evaluation.status == "ok", evaluation.reason
    module, losses, _ = fitted(files, steps=2, module=make_module(files, configuration="4:2 4:4 4:2", **options))
    assert len(losses) == 2
    searched, fit = packed_weights(evaluator.parts.module), packed_weights(module)
    assert searched.keys() == fit.keys()
    assert all(torch.equal(fit[name], tensor) for name, tensor in searched.items())
    assert module.backbone.digest() == evaluator.parts.module.backbone.digest()
    assert evaluator.fingerprint()["model"] == module.backbone.digest()


def test_number_of_calibration_sequences_changes_the_weights(files: Files) -> None:
    few, many = (
        fitted(
            files,
            steps=1,
            module=make_module(files, configuration="4:2", quantizers={4: GPTQ}, calibration_sequences=n),
        )[0]
        for n in (2, 16)
    )
    assert any(not torch.equal(tensor, packed_weights(many)[name]) for name, tensor in packed_weights(few).items())


def test_importance_at_a_calibrated_bit_width_is_measured(files: Files, tmp_path: Path) -> None:
    from tiny_runs import opened

    from qratk.estimators.base import estimators

    evaluator = opened(
        tmp_path, files, {"accelerator": "cpu", "devices": 1}, quantizers={2: {**GPTQ}}, calibration_sequences=4
    )
    scores = evaluator.importance(estimators.create("activation_error"), evaluator.space)
    assert (scores > 0).all()
