"""On a GPU what the CPU does: packed codes, switches, training, candidates side by side, rungs to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import MIXED, Files, adapters_of, evaluated, fitted, make_module, opened
from torch.optim import AdamW

from qratk.adapters.options import AdapterOptions
from qratk.backbone.backbone import Backbone
from qratk.backbone.loading import resolve_dtype
from qratk.backbone.logits import labelled_logits, labelled_loss, replicate, targets_of
from qratk.core.configuration import Configuration
from qratk.training.cohort import Cohort

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"
BITS = (2, 3, 4, 8, 16)
MEMBERS = (
    Configuration.of([2, 4, 8], [2, 8, 4]),
    Configuration.of([4, 4, 2], [8, 2, 16]),
    Configuration.of([4, 2, 3], [4, 4, 0]),
)
ONE = {"accelerator": "gpu", "devices": 1}
OTHER = "4:4 2:2 8:4"


@pytest.fixture(scope="module")
def files(model_dir: Path, data_files: dict[str, str]) -> Files:
    return Files(str(model_dir), data_files)


def moved(backbone: Backbone) -> Backbone:
    backbone.model.to(DEVICE)
    return backbone


def batch_of(length: int = 14, rows: int = 3) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(length))
    labels = torch.where(torch.arange(length) % 3 == 2, ids, -100)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: value.to(DEVICE) for name, value in batch.items()}


def train(model: Any, parameters: list[Any], size: int, steps: int = 5) -> torch.Tensor:
    """Losses (steps, size) of training on batches of several lengths."""
    optimizer = AdamW([p for _, p in parameters], lr=1e-2, fused=True)
    torch.manual_seed(3)
    losses = []
    for step in range(steps):
        whole = replicate(batch_of(12 + step % 2), size)
        positions, target = targets_of(whole["labels"])
        loss = labelled_loss(labelled_logits(model, whole, positions), target, size)
        loss.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def alone(backbone: Backbone, configuration: Configuration) -> torch.Tensor:
    backbone.model.train()
    backbone.activate(configuration, seed=7)
    return train(backbone.model, backbone.trainable_parameters(), 1)[:, 0]


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
def test_bank_packed_on_the_device_is_that_of_the_cpu(bits: int, tiny_backbone: Callable[..., Backbone]) -> None:
    expected, found = tiny_backbone("llama", bits=(bits,)), moved(tiny_backbone("llama"))
    found.build_bank((bits,))
    for name, bank in found.banks.items():
        packed, reference = bank.variants[bits].packed, expected.banks[name].variants[bits].packed
        assert packed.keys() == reference.keys()
        assert all(tensor.device.type == DEVICE for tensor in packed.values())
        if bits == 16:
            assert all(torch.equal(packed[key].cpu(), value) for key, value in reference.items())
        # Sums are rounded otherwise there: a code on the edge may fall to its neighbour, so weights are compared.
        dense, exact = bank.dequantized(bits).cpu(), expected.banks[name].dequantized(bits)
        differing = (dense - exact).abs() > 1e-3 * exact.abs().max()
        assert differing.float().mean() < 0.01
        assert (dense - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", BITS)
def test_bank_moved_to_the_device_stands_for_the_same_weights(
    bits: int, dtype: torch.dtype, tiny_backbone: Callable[..., Backbone]
) -> None:
    backbone = tiny_backbone("llama", bits=BITS)
    expected = {name: bank.dequantized(bits, dtype) for name, bank in backbone.banks.items()}
    moved(backbone)
    for name, bank in backbone.banks.items():
        found = bank.dequantized(bits, dtype)
        assert (found.device.type, found.dtype) == (DEVICE, dtype)
        tolerance = 1e-6 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(found.cpu(), expected[name], rtol=tolerance, atol=tolerance / 100)


def test_mapped_bank_is_moved_to_the_device(tiny_backbone: Callable[..., Backbone], tmp_path: Path) -> None:
    made, mapped = (moved(tiny_backbone("llama", bank_dir=tmp_path)) for _ in range(2))
    for backbone in (made, mapped):
        backbone.build_bank((2, 4))
    for name, bank in mapped.banks.items():
        for bits in (2, 4):
            packed = bank.variants[bits].packed
            assert all(tensor.device.type == DEVICE for tensor in packed.values())
            assert all(torch.equal(made.banks[name].variants[bits].packed[key], packed[key]) for key in packed)


def test_switch_there_and_back_gives_the_same_logits(tiny_backbone: Callable[..., Backbone]) -> None:
    backbone = moved(tiny_backbone("llama", bits=BITS))
    backbone.release_reference()
    logits = []
    for configuration in (MEMBERS[0], MEMBERS[1], MEMBERS[0]):
        backbone.activate(configuration, seed=0)
        assert {p.device.type for _, p in backbone.trainable_parameters()} == {DEVICE}
        logits.append(backbone.model(input_ids=batch_of()["input_ids"]).logits)
    assert torch.equal(logits[0], logits[2])
    assert not torch.equal(logits[0], logits[1])


def test_training_in_float32_has_the_losses_of_the_cpu(tiny_backbone: Callable[..., Backbone]) -> None:
    backbone = tiny_backbone("llama", bits=BITS, compute_dtype="float32")
    on_device = alone(moved(backbone), MEMBERS[0])
    backbone.model.to("cpu")
    backbone.model.train()
    backbone.activate(MEMBERS[0], seed=7)
    optimizer = AdamW([p for _, p in backbone.trainable_parameters()], lr=1e-2)
    for step, expected in enumerate(on_device.tolist()):
        batch = {name: value.cpu() for name, value in batch_of(12 + step % 2).items()}
        positions, target = targets_of(batch["labels"])
        loss = labelled_loss(labelled_logits(backbone.model, batch, positions), target)[0]
        assert loss.item() == pytest.approx(expected, rel=1e-3)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_compute_dtype_is_bfloat16_by_itself_and_training_learns(tiny_backbone: Callable[..., Backbone]) -> None:
    assert resolve_dtype("auto") == torch.bfloat16 or not torch.cuda.is_bf16_supported()
    backbone = moved(tiny_backbone("llama", bits=BITS))
    assert backbone.model(input_ids=batch_of()["input_ids"]).logits.dtype == backbone.compute_dtype
    losses = alone(backbone, MEMBERS[0])
    assert losses[-2:].max() < losses[:2].min()
    assert {p.dtype for _, p in backbone.trainable_parameters()} == {torch.float32}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 3e-2)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_candidates_side_by_side_have_the_losses_of_being_alone(
    dtype: str, tolerance: float, dropout: float, tiny_backbone: Callable[..., Backbone]
) -> None:
    options = {"compute_dtype": dtype, "adapter": AdapterOptions(dropout=dropout)}
    backbone = moved(tiny_backbone("llama", bits=BITS, **options))
    members = MEMBERS[:2]  # dropout leaves out a rank of 0
    backbone.model.train()
    cohort = Cohort.of(backbone, members, seed=7)
    with cohort.installed() as model:
        losses = train(model, cohort.parameters(), len(cohort))
    for index, configuration in enumerate(members):
        torch.testing.assert_close(losses[:, index], alone(backbone, configuration), rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dense_cache_changes_no_bit(dtype: str, tiny_backbone: Callable[..., Backbone]) -> None:
    losses = []
    for mode in ("off", "on", "auto"):
        backbone = moved(tiny_backbone("llama", bits=BITS, compute_dtype=dtype))
        backbone.dense_cache(mode)
        losses.append(torch.stack([alone(backbone, configuration) for configuration in MEMBERS]))
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_fit_learns_in_every_precision(files: Files, precision: str, clip: float | None) -> None:
    module, losses, score = fitted(files, steps=8, precision=precision, gradient_clip_val=clip, **ONE)
    assert min(losses[-2:]) < losses[0]
    assert score > -10
    assert {p.dtype for _, p in module.backbone.trainable_parameters()} == {torch.float32}


def test_lightning_checkpoint_continues_with_the_devices_own_dropout(files: Files, tmp_path: Path) -> None:
    options = {"lora_dropout": 0.5, "schedule_steps": 4}
    whole, losses, _ = fitted(files, steps=4, module=make_module(files, **options), keep=tmp_path, **ONE)
    (half,) = tmp_path.glob("*step=2.ckpt")
    torch.cuda.manual_seed(99)
    again = make_module(files, **options)
    _, rest, _ = fitted(files, steps=4, module=again, resume=str(half), keep=tmp_path, **ONE)
    assert rest == losses[2:]
    expected = adapters_of(whole)
    assert all(torch.equal(value, expected[name]) for name, value in adapters_of(again).items())


@pytest.mark.parametrize("cohort", [1, 2])
def test_rungs_continue_to_the_bit_with_dropout(files: Files, tmp_path: Path, cohort: int) -> None:
    texts = (MIXED, OTHER)[:cohort]
    whole = opened(tmp_path / "whole", files, ONE, cohort=cohort, lora_dropout=0.3)
    expected = evaluated(whole, 6, *texts)
    for steps in (2, 4):
        rungs = opened(tmp_path / "rungs", files, ONE, cohort=cohort, lora_dropout=0.3)
        evaluated(rungs, steps, *texts)
    torch.cuda.manual_seed(99)  # as in another process
    continued = opened(tmp_path / "rungs", files, ONE, cohort=cohort, lora_dropout=0.3)
    found = evaluated(continued, 6, *texts)
    assert [(e.score, e.outcomes) for e in found] == [(e.score, e.outcomes) for e in expected]


def test_candidates_of_a_search_side_by_side_score_as_alone(files: Files, tmp_path: Path) -> None:
    options = {"compute_dtype": "float32"}
    one = evaluated(opened(tmp_path / "one", files, ONE, **options), 4, MIXED, OTHER)
    two = evaluated(opened(tmp_path / "two", files, ONE, cohort=2, **options), 4, MIXED, OTHER)
    assert [e.score for e in two] == pytest.approx([e.score for e in one], rel=1e-4)


def test_candidates_side_by_side_follow_one_alone(files: Files, tmp_path: Path) -> None:
    together = opened(tmp_path / "together", files, ONE, cohort=2, compute_dtype="float32")
    before = evaluated(together, 2, "2:2 2:2 2:2")
    after = evaluated(together, 4, MIXED, OTHER)
    alone = evaluated(opened(tmp_path / "alone", files, ONE, compute_dtype="float32"), 4, MIXED, OTHER)
    assert [e.status for e in before] == ["ok"]
    assert [e.score for e in after] == pytest.approx([e.score for e in alone], rel=1e-4)
