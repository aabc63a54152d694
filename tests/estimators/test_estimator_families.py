"""Estimators on the backbone of every model family, against dense gradients by autograd."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers.pytorch_utils import Conv1D

from qratk.estimators.base import estimators


@pytest.fixture(params=["llama", "qwen3", "gemma", "phi", "gpt_neox", "opt", "gpt2"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def dense_gradients(model: torch.nn.Module, names: list[str], batch: dict[str, Any], row: int) -> dict[str, Any]:
    """Gradient (d_out, d_in) of one unpadded sequence's mean loss, by the projection's name."""
    model.zero_grad()
    kept = int(batch["attention_mask"][row].sum())
    logits = model(input_ids=batch["input_ids"][row : row + 1, :kept]).logits[0, :-1]
    cross_entropy(logits, batch["labels"][row, 1:kept], ignore_index=-100).backward()
    projections = {name: model.get_submodule(name) for name in names}
    return {n: (p.weight.grad.T if isinstance(p, Conv1D) else p.weight.grad).clone() for n, p in projections.items()}


def test_both_signals_equal_dense_gradients_in_every_family(
    family: str, tiny_model: Callable[..., Any], tiny_backbone: Callable[..., Any], tiny_batch: dict[str, Any]
) -> None:
    labels = tiny_batch["input_ids"].masked_fill(tiny_batch["attention_mask"] == 0, -100)
    labels[:, :3] = -100
    batch = {**tiny_batch, "labels": labels}
    plain, backbone = tiny_model(family, layers=2), tiny_backbone(family, layers=2, bits=(4,))
    names = [name for layer in backbone.layers for name, _ in layer.modules]
    gradients = [dense_gradients(plain, names, batch, row) for row in range(2)]
    expected_bits, expected_rank = [], []
    for layer in backbone.layers:
        residuals = {name: (bank.reference - bank.dequantized(4)).square() for name, bank in layer.modules}
        expected_bits.append(sum(float((g[n].square() * r).sum()) / 2 for g in gradients for n, r in residuals.items()))
        means = [(gradients[0][name] + gradients[1][name]) / 2 for name in residuals]
        expected_rank.append(sum(float(torch.linalg.svdvals(mean)[:8].square().sum()) for mean in means))
    module: Any = SimpleNamespace(backbone=backbone)
    bits = estimators.create("fisher_residual").estimate(module, [batch], lowest_bits=4)
    rank = estimators.create("gradient_spectrum").estimate(module, [batch], lowest_bits=4)
    np.testing.assert_allclose(bits, expected_bits, rtol=1e-3)
    np.testing.assert_allclose(rank, expected_rank, rtol=1e-3)
