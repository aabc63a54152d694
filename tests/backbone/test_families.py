"""All model families run at mixed bits and ranks."""

from __future__ import annotations

import pytest
import torch

from qratk.core.configuration import Configuration

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma", "phi", "gpt_neox", "opt", "gpt2")


@pytest.mark.parametrize("family", FAMILIES)
def test_sixteen_bits_and_rank_zero_equal_the_plain_model(family, tiny_model, tiny_backbone, tiny_batch):
    with torch.no_grad():
        expected = tiny_model(family)(**tiny_batch).logits
        actual = tiny_backbone(family).model(**tiny_batch).logits
    if family == "gpt2":  # Conv1D multiplies by the transposed layout: another order of summation
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_bits_and_ranks_give_gradients_to_every_adapter(family, tiny_backbone, tiny_batch):
    backbone = tiny_backbone(family, bits=(2, 3, 4, 8))
    backbone.activate(Configuration.of([2, 4, 8], [4, 0, 8]), seed=0)
    logits = backbone.model(**tiny_batch).logits
    logits.float().logsumexp(-1).mean().backward()
    parameters = dict(backbone.trainable_parameters())
    assert parameters
    assert {p.shape[0] for n, p in parameters.items() if "lora_A" in n} == {4, 8}
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all())
        assert ("lora_A" in name) or parameter.grad.abs().sum() > 0, name
