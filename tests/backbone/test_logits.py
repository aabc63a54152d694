"""Logits only where tokens are predicted, shared prompts, several candidates in a batch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from qratk.backbone import logits as logits_module
from qratk.backbone.logits import (
    by_length,
    labelled_logits,
    labelled_loss,
    model_inputs,
    replicate,
    shared_length,
    target_greedy,
    target_log_likelihood,
    targets_of,
    training_losses,
)
from qratk.core.configuration import Configuration
from qratk.data.batches import scoring_batches
from qratk.data.encoding import encoded

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma", "phi", "gpt_neox", "opt", "gpt2")


def choice_rows(items: int = 4) -> list[Any]:
    """Items of two to four rows that share three to nine tokens, and one item whose rows share nothing."""
    rng = np.random.default_rng(3)
    rows = []
    for item in range(items):
        trunk = rng.integers(3, 90, 3 + 2 * item).tolist() if item else []
        for _ in range(2 + item % 3):
            branch = rng.integers(3, 90, rng.integers(1, 6)).tolist()
            head = trunk or rng.integers(3, 90, 4).tolist()
            rows.append(encoded(head + branch, [False] * len(head) + [True] * len(branch), item=item))
    return rows


def training_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    input_ids = torch.randint(3, 90, (3, 11), generator=generator)
    labels = torch.where(torch.rand(3, 11, generator=generator) < 0.4, input_ids, -100)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 8:], labels[1, 8:] = 0, -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def mixed(backbone: Any) -> Any:
    """The backbone at mixed bits and ranks, with adapters that matter."""
    backbone.activate(Configuration.of([2, 4, 8], [4, 0, 8]), seed=0)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, parameter in backbone.trainable_parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return backbone


def plain_scores(model: Any, rows: list[Any]) -> list[float]:
    """Log-likelihoods by one forward pass a row and a loop over its labels."""
    scores = []
    for row in rows:
        ids = torch.tensor(row.tokens[None].astype(np.int64))
        log_p = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
        scores.append(sum(float(log_p[k - 1, ids[0, k]]) for k in row.labelled.nonzero()[0]))
    return scores


def likelihoods(model: Any, batches: list[Any], rows: int) -> torch.Tensor:
    found = torch.full((rows,), torch.nan)
    with torch.no_grad():
        for batch in batches:
            found[batch["row"]], _ = target_log_likelihood(labelled_logits(model, batch), batch)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_equal_those_of_the_whole_batch(family: str, tiny_backbone: Any) -> None:
    backbone = mixed(tiny_backbone(family, bits=(2, 4, 8)))
    batch = training_batch()
    parameters = [p for _, p in backbone.trainable_parameters()]
    full = backbone.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    expected_loss = cross_entropy(full[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    expected = torch.autograd.grad(expected_loss, parameters)
    positions, target = targets_of(batch["labels"])
    logits = labelled_logits(backbone.model, batch, positions)
    loss = labelled_loss(logits, target)[0]
    torch.testing.assert_close(logits, full.flatten(0, 1)[positions], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(torch.autograd.grad(loss, parameters), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_computes_labelled_positions_only(family: str, tiny_backbone: Any) -> None:
    backbone, batch, seen = tiny_backbone(family), training_batch(), []
    head = backbone.base.get_output_embeddings()
    with head.register_forward_hook(lambda module, arguments, output: seen.append(tuple(output.shape))):
        logits = labelled_logits(backbone.model, batch)
    number = int((batch["labels"][:, 1:] != -100).sum())
    assert seen == [(1, number, logits.shape[-1])]
    assert len(head._forward_pre_hooks) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_prompts_give_the_likelihoods_of_single_rows(family: str, tiny_backbone: Any) -> None:
    backbone, rows = mixed(tiny_backbone(family, bits=(2, 4, 8))), choice_rows()
    limit = shared_length(backbone.model)
    assert limit == 64  # the context of the tiny models
    batches = scoring_batches(rows, size=3, pad_id=0, shared_length=limit)
    assert {"segments" in batch for batch in batches} == {True, False}
    with torch.no_grad(), backbone.stored_precision():
        expected = torch.tensor(plain_scores(backbone.model, rows))
        found = likelihoods(backbone.model, batches, len(rows))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


class Deaf(torch.nn.Module):
    """A model that hears of neither masks nor positions, as some families do."""

    def __init__(self, model: Any, deaf_to: str) -> None:
        super().__init__()
        self.inner, self.deaf_to, self.config = model, deaf_to, model.config

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "inner" else getattr(self.inner, name)

    def forward(self, **arguments: Any) -> Any:
        if self.deaf_to == "position_ids" or arguments["attention_mask"].dim() == 4:
            arguments.pop(self.deaf_to, None)
        return self.inner(**arguments)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("argument", ["position_ids", "attention_mask"])
def test_a_model_that_ignores_positions_or_masks_shares_no_prompts(family: str, argument: str, tiny_model: Any) -> None:
    model = tiny_model(family)
    assert shared_length(model) > 0
    assert shared_length(Deaf(model, argument)) == 0


@pytest.mark.parametrize(("deaf_to", "share", "shares"), [("", 0.006, True), ("", 0.1, False), ("mask", 0.006, False)])
def test_what_deep_models_round_off_in_16_bits_is_no_mistake(
    deaf_to: str, share: float, shares: bool, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = torch.Generator().manual_seed(0)

    def rounded(model: Any, batch: Any) -> torch.Tensor:
        logits = labelled_logits(model, batch).float()
        return logits + share * logits.std(-1).mean() * torch.randn(logits.shape, generator=noise) / 2**0.5

    monkeypatch.setattr("qratk.backbone.logits.labelled_logits", rounded)
    model: Any = tiny_model("llama").to(torch.float16)
    for layer in model.model.layers:  # so that positions count, as in a model that was trained
        layer.self_attn.q_proj.weight.data.mul_(30)
    assert (shared_length(Deaf(model, "attention_mask") if deaf_to else model) > 0) is shares


@pytest.mark.parametrize("family", ["bloom", "mpt", "mamba"])
def test_families_without_free_masks_are_scored_row_by_row(family: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {
        "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
        "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
        "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    }
    config = AutoConfig.for_model(family, vocab_size=96, **sizes[family])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    assert shared_length(model) == 0
    rows = choice_rows()
    found = likelihoods(model, scoring_batches(rows, size=3, pad_id=0), len(rows))
    with torch.no_grad():
        torch.testing.assert_close(found, torch.tensor(plain_scores(model, rows)), rtol=1e-5, atol=1e-4)


def test_the_trial_does_not_depend_on_adapters_and_leaves_the_model_as_it_was(tiny_backbone: Any) -> None:
    backbone = mixed(tiny_backbone("llama", bits=(2, 4, 8)))
    model = backbone.model.train()
    model.base_model.model.model.norm.eval()
    modes = [module.training for module in model.modules()]
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with torch.no_grad():
        backbone.trainable_parameters()[0][1].fill_(torch.nan)
    before = torch.get_rng_state()
    assert shared_length(model) == 64
    assert torch.equal(before, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert wanted == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert not bool(labelled_logits(model, training_batch()).isfinite().all())  # the adapters are back


def test_attention_that_slides_bounds_shared_rows(tiny_model: Any) -> None:
    model = tiny_model("mistral")
    model.config.sliding_window = 40
    assert shared_length(model) == 40
    model.config.sliding_window = 8
    assert shared_length(model) == 0


def test_a_head_that_is_out_of_reach_gives_the_same_logits(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny_model("llama"), training_batch()
    expected = labelled_logits(model, batch)
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    torch.testing.assert_close(labelled_logits(model, batch), expected, rtol=1e-6, atol=1e-6)
    monkeypatch.setattr(model, "get_output_embeddings", lambda: torch.nn.Linear(1, 1))  # never called
    torch.testing.assert_close(labelled_logits(model, batch), expected, rtol=1e-6, atol=1e-6)


def test_logits_are_processed_as_the_family_does() -> None:
    from transformers import AutoModelForCausalLM, Gemma2Config

    config = Gemma2Config(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=32, final_logit_softcapping=0.5,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    batch = training_batch()
    with torch.no_grad():
        found = labelled_logits(model, batch)
        full = model(**model_inputs(batch)).logits.flatten(0, 1)[targets_of(batch["labels"])[0]]
    assert float(found.abs().max()) < 0.5
    torch.testing.assert_close(found, full, rtol=1e-6, atol=1e-6)


def random_targets(dtype: torch.dtype) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(9, 17, generator=generator)).to(dtype)
    target_row = torch.tensor([0, 0, 1, 1, 1, 3, 3, 3, 3])  # row 2 has no target
    return logits, {
        "target": torch.randint(17, (9,), generator=generator),
        "target_at": torch.tensor([0, 1, 0, 2, 3, 4, 6, 7, 8]),
        "target_row": target_row,
        "row": torch.tensor([5, 1, 2, 0]),
    }


@pytest.mark.parametrize("chunk", [1, 100, 1 << 26])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_target_log_likelihood_equals_a_loop(monkeypatch: pytest.MonkeyPatch, chunk: int, dtype: torch.dtype) -> None:
    monkeypatch.setattr(logits_module, "_CHUNK_BYTES", chunk)
    logits, batch = random_targets(dtype)
    sums, counts = target_log_likelihood(logits, batch)
    expected, numbers = [0.0] * 4, [0] * 4
    for token, at, row in zip(*(batch[name].tolist() for name in ("target", "target_at", "target_row")), strict=True):
        values = logits[at].double().tolist()
        expected[row] += values[token] - math.log(sum(map(math.exp, values)))
        numbers[row] += 1
    assert counts.tolist() == numbers
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5)


def test_rows_whose_targets_are_all_the_likeliest_are_told() -> None:
    logits, batch = random_targets(torch.float32)
    likeliest = logits.argmax(1)
    assert target_greedy(logits, batch).tolist() == [False, False, True, False]  # row 2 has no target
    batch["target"] = likeliest[batch["target_at"]]
    assert target_greedy(logits, batch).tolist() == [True] * 4
    batch["target"][3] = (batch["target"][3] + 1) % 17
    assert target_greedy(logits, batch).tolist() == [True, False, True, True]
    logits[batch["target_at"][3]] = 1.0  # of equals the first
    batch["target"][3] = 0
    assert target_greedy(logits, batch).tolist() == [True] * 4


def test_a_batch_without_targets_scores_nothing() -> None:
    logits, batch = random_targets(torch.float32)
    empty = {name: value[:0] for name, value in batch.items() if name != "row"} | {"row": batch["row"]}
    sums, counts = target_log_likelihood(logits[:0], empty)
    assert sums.tolist() == [0.0] * 4
    assert counts.tolist() == [0] * 4


def test_replicated_batches_give_every_candidate_the_same(tiny_backbone: Any) -> None:
    model, rows = mixed(tiny_backbone("llama", bits=(2, 4, 8))).model, choice_rows()
    for batch in scoring_batches(rows, size=3, pad_id=0, shared_length=64):
        with torch.no_grad():
            one, tokens = target_log_likelihood(labelled_logits(model, batch), batch)
            copied = replicate(batch, 3)
            logits = labelled_logits(model, copied)
            all_three, counts = target_log_likelihood(logits, copied)
        assert len(logits) == 3 * len(batch["predictor"])
        torch.testing.assert_close(all_three.view(3, -1), one.expand(3, -1), rtol=1e-5, atol=1e-5)
        assert counts.view(3, -1).tolist() == [tokens.tolist()] * 3
        assert copied["row"].view(3, -1).tolist() == [batch["row"].tolist()] * 3


def test_losses_of_replicated_training_batches_are_of_each_candidate(tiny_model: Any) -> None:
    model, batch = tiny_model("llama"), training_batch()
    copied = replicate(batch, 2)
    positions, target = targets_of(batch["labels"])
    both, again = targets_of(copied["labels"])
    with torch.no_grad():
        one = labelled_loss(labelled_logits(model, batch, positions), target)
        logits = labelled_logits(model, copied, both)
    torch.testing.assert_close(labelled_loss(logits, target, 2), one.expand(2))
    assert torch.equal(labelled_loss(logits, target, 2), labelled_loss(logits, again, 2))


def ragged_batch(rows: int = 12) -> dict[str, torch.Tensor]:
    """Rows of 4 to 40 tokens, in no order."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(4, 40, (rows,), generator=generator)
    lengths[3] = 40
    input_ids = torch.randint(3, 90, (rows, 40), generator=generator)
    attention_mask = (torch.arange(40) < lengths[:, None]).long()
    labels = torch.where((torch.rand(rows, 40, generator=generator) < 0.2) & (attention_mask == 1), input_ids, -100)
    labels[0] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def test_parts_by_length_hold_every_row_once_without_superfluous_padding() -> None:
    batch = ragged_batch()
    parts = by_length(batch, overhead=10.0)
    assert len(parts) > 2
    lengths = [part["attention_mask"].sum(1) for part in parts]
    assert all(int(own.max()) == part["input_ids"].shape[1] for own, part in zip(lengths, parts, strict=True))
    whole = {
        tuple(row[mask == 1].tolist()) for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    }
    found = [
        tuple(row[mask == 1].tolist())
        for part in parts
        for row, mask in zip(part["input_ids"], part["attention_mask"], strict=True)
    ]
    assert len(found) == 12
    assert set(found) == whole
    assert sum(int((part["labels"] != -100).sum()) for part in parts) == int((batch["labels"] != -100).sum())


def test_a_batch_of_equal_lengths_or_dear_passes_stays_as_it_is() -> None:
    batch = ragged_batch()
    (same,) = by_length(batch, overhead=1e6)
    assert all(torch.equal(same[name], batch[name]) for name in batch)
    full = {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}
    assert len(by_length(full, overhead=1.0)) == 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("candidates", [1, 3])
def test_cutting_a_batch_by_length_changes_losses_and_gradients_by_rounding_only(
    family: str, candidates: int, tiny_backbone: Any
) -> None:
    backbone = mixed(tiny_backbone(family, bits=(2, 4, 8)))
    results = []
    for overhead in (None, 10.0):
        losses = training_losses(backbone.model, ragged_batch(), candidates, overhead=overhead)
        parameters = [p for _, p in backbone.trainable_parameters()]
        results.append((losses, torch.autograd.grad(losses.sum(), parameters)))
    (whole, gradients), (cut, others) = results
    assert whole.shape == (candidates,)
    torch.testing.assert_close(cut, whole, rtol=1e-6, atol=0)
    for gradient, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(other, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_logits_have_the_same_losses_and_gradients_as_few(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(14, 11, generator=generator)).to(dtype).requires_grad_()
    target = torch.randint(0, 11, (7,), generator=generator)
    weights = torch.tensor([0.3, 1.7])

    def found() -> tuple[torch.Tensor, torch.Tensor]:
        losses = labelled_loss(logits, target, 2)
        return losses.detach(), torch.autograd.grad((losses * weights).sum(), logits)[0]

    losses, gradient = found()
    monkeypatch.setattr(logits_module, "_MANY", 0)
    monkeypatch.setattr(logits_module, "_ROWS_BYTES", 4 * 11 * 3)  # some rows are left over
    many, other = found()
    assert losses.dtype == many.dtype == torch.float32
    torch.testing.assert_close(many, losses)
    torch.testing.assert_close(other, gradient, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
