"""Tiny random models whose projections are bank layers, and gradients by plain autograd to compare with."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from qratk.bank.linear import BankLinear, PackedVariant
from qratk.estimators.base import estimators
from qratk.quantizers.base import quantizers

LOWEST = 4
VOCABULARY = 40


@dataclass(frozen=True)
class Models:
    """A module of bank layers as estimators see it, and the plain model with the same weights."""

    module: Any
    plain: nn.Module
    transposed: bool  # Conv1D stores (d_in, d_out)


def llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32, attention_dropout=0.3, initializer_range=0.2,
        )
    )  # fmt: skip


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=3, n_head=4, n_positions=32, initializer_range=0.2)
    )


FAMILIES = {"llama": llama, "gpt2": gpt2}


def models(make: Any) -> Models:
    """Both forms of a model; its layers are the blocks."""
    plain, banked = make().eval(), make()
    for model in (plain, banked):  # the 16-bit variant is the compute dtype's; rounded first, both hold the same
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())
    blocks = banked.model.layers if hasattr(banked, "model") else banked.transformer.h
    prefix = "model.layers" if hasattr(banked, "model") else "transformer.h"
    layers, transposed = [], False
    for number, block in enumerate(blocks):
        found = []
        for local, child in list(block.named_modules()):
            if isinstance(child, nn.Linear | Conv1D):
                transposed = isinstance(child, Conv1D)
                bank = banked_linear(child)
                parent, _, leaf = local.rpartition(".")
                setattr(block.get_submodule(parent), leaf, bank)
                found.append((f"{prefix}.{number}.{local}", bank))
        layers.append(SimpleNamespace(name=f"{prefix}.{number}", modules=tuple(found)))
    banked.requires_grad_(False)
    module = SimpleNamespace(backbone=SimpleNamespace(model=banked, layers=tuple(layers)))
    return Models(module, plain, transposed)


def banked_linear(child: nn.Module) -> BankLinear:
    weight = child.weight.detach()
    bank = BankLinear(weight.T if isinstance(child, Conv1D) else weight, child.bias)
    for bits, name in ((16, "none"), (LOWEST, "nf4")):
        quantizer = quantizers.create(name)
        bank.add_variant(bits, PackedVariant(quantizer, bits, quantizer.quantize(bank.reference, bits)))
    bank.activate(16)
    return bank


def batches(count: int = 2, size: int = 3, length: int = 9) -> list[dict[str, Tensor]]:
    """Right-padded batches with prompts that are not labelled."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for number in range(count):
        ids = torch.randint(0, VOCABULARY, (size, length), generator=generator)
        lengths = torch.tensor([length - (row + number) % 4 for row in range(size)])
        mask = (torch.arange(length) < lengths[:, None]).long()
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :3] = -100
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


def dense_gradients(models: Models, batch: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
    """Gradient (d_out, d_in) by name of the mean loss of the labelled tokens, averaged over the rows' sequences."""
    model = models.plain
    model.zero_grad()
    names = [name for layer in models.module.backbone.layers for name, _ in layer.modules]
    losses = []
    for row in range(*rows.indices(len(batch["labels"]))):
        kept = int(batch["attention_mask"][row].sum())  # no padding at all
        logits = model(input_ids=batch["input_ids"][row : row + 1, :kept]).logits[0, :-1]
        losses.append(cross_entropy(logits, batch["labels"][row, 1:kept], ignore_index=-100))
    torch.stack(losses).mean().backward()
    gradients = {name: model.get_submodule(name).weight.grad.clone() for name in names}
    return {name: g.T if models.transposed else g for name, g in gradients.items()}


def estimate(name: str, models: Models, batches: list[dict[str, Tensor]], **options: object) -> np.ndarray:
    return estimators.create(name, **options).estimate(models.module, batches, lowest_bits=LOWEST)
