"""Candidates trained side by side against each of them trained alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.optim import AdamW

from qratk.adapters.options import AdapterOptions
from qratk.backbone.backbone import Backbone
from qratk.backbone.logits import labelled_logits, labelled_loss, replicate, targets_of
from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError, QuantizationError
from qratk.training.cohort import Cohort

MIX = (
    Configuration.of([2, 4, 8], [2, 8, 4]),
    Configuration.of([4, 4, 2], [8, 2, 16]),
    Configuration.of([4, 2, 2], [4, 4, 2]),
    Configuration.of([2, 4, 8], [2, 8, 4]),
)
STEPS = 6
CLIP = 0.05


def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(STEPS):
        ids = torch.randint(3, 96, (3, 14), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, 9:] = 0
        labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.5, ids, -100)
        labels[0, 9:] = -100
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


def loss_of(model: Any, batch: dict[str, torch.Tensor], size: int) -> torch.Tensor:
    whole = replicate(batch, size)
    positions, target = targets_of(whole["labels"])
    return labelled_loss(labelled_logits(model, whole, positions), target, size)


def alone(backbone: Backbone, configuration: Configuration) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses (steps,) of a candidate, and its adapters."""
    backbone.activate(configuration, seed=7)
    torch.manual_seed(3)
    parameters = [p for _, p in backbone.trainable_parameters()]
    optimizer = AdamW(parameters, lr=1e-2)
    losses = []
    for batch in batches():
        loss = loss_of(backbone.model, batch, 1)[0]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses), backbone.adapter_state()


def together(backbone: Backbone, configurations: Sequence[Configuration]) -> tuple[torch.Tensor, Cohort]:
    """Losses (steps, K) of candidates side by side, and the cohort afterwards."""
    cohort = Cohort.of(backbone, configurations, seed=7)
    torch.manual_seed(3)
    optimizer = AdamW([p for _, p in cohort.parameters()], lr=1e-2)
    losses = []
    with cohort.installed() as model:
        for batch in batches():
            loss = loss_of(model, batch, len(cohort))
            loss.sum().backward()
            cohort.clip_gradients(CLIP)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    return torch.stack(losses), cohort


def check(backbone: Backbone, configurations: Sequence[Configuration], tolerance: float = 1e-5) -> None:
    backbone.model.train()
    losses, cohort = together(backbone, configurations)
    for member, configuration in enumerate(configurations):
        expected, state = alone(backbone, configuration)
        torch.testing.assert_close(losses[:, member], expected, rtol=tolerance, atol=0)
        assert losses[-1, member] != losses[0, member]
        found = cohort.state(member)
        assert found.keys() == state.keys()
        assert all(found[name].shape == state[name].shape for name in state)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "gpt_neox", "opt", "gpt2"])
def test_each_candidate_of_a_cohort_has_the_losses_of_being_trained_alone(
    family: str, tiny_backbone: Callable[..., Backbone]
) -> None:
    check(tiny_backbone(family, bits=(2, 4, 8)), MIX)


@pytest.mark.parametrize("mode", ["on", "auto"])
def test_the_dense_cache_changes_no_digit_of_a_cohort(mode: str, tiny_backbone: Callable[..., Backbone]) -> None:
    backbone, reference = (tiny_backbone("llama", bits=(2, 3, 4, 8)) for _ in range(2))
    backbone.dense_cache(mode)
    reference.dense_cache("off")
    members = (*MIX, Configuration.uniform(3, 4, 3))
    assert torch.equal(together(backbone, members)[0], together(reference, members)[0])


@pytest.mark.parametrize("rslora", [False, True])
def test_adapters_follow_autocast_as_those_of_a_candidate_alone(
    rslora: bool, tiny_backbone: Callable[..., Backbone]
) -> None:
    backbone = tiny_backbone("llama", bits=(2, 4, 8), adapter=AdapterOptions(rslora=rslora))
    batch, (first, second) = batches()[0], MIX[:2]
    cohort = Cohort.of(backbone, (first, second), seed=7)
    generator = torch.Generator().manual_seed(5)
    states = [
        {n: 0.3 * torch.randn(t.shape, generator=generator) for n, t in cohort.state(k).items()} for k in range(2)
    ]
    for member, state in enumerate(states):
        cohort.load_state(member, state)
    with cohort.installed() as model, torch.autocast("cpu", torch.bfloat16):
        found = loss_of(model, batch, 2)
    found.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for _, p in cohort.parameters())
    for member, configuration in enumerate((first, second)):
        backbone.activate(configuration, seed=7)
        backbone.load_adapter_state(states[member])
        with torch.autocast("cpu", torch.bfloat16):
            expected = loss_of(backbone.model, batch, 1)[0]
        torch.testing.assert_close(found[member], expected, rtol=1e-4, atol=0)


def test_rank_stabilised_scaling_is_each_candidates_own(tiny_backbone: Callable[..., Backbone]) -> None:
    options = AdapterOptions(rslora=True, alpha=6.0)
    check(tiny_backbone("llama", bits=(2, 4, 8), adapter=options), MIX)


@pytest.mark.parametrize(
    "options",
    [
        {"init": "loftq", "rslora": True},
        {"init": "loftq", "init_iterations": 2},
        {"input_groups": 8},
        {"init": "loftq", "input_groups": 16, "dropout": 0.3},
    ],
    ids=str,
)
def test_other_beginnings_and_pooled_inputs_are_those_of_being_trained_alone(
    options: dict[str, Any], tiny_backbone: Callable[..., Backbone]
) -> None:
    backbone = tiny_backbone("llama", bits=(2, 4, 8), adapter=AdapterOptions(**options), bank_dir=None)
    backbone.build_initial([(bits, rank) for bits in (2, 4, 8) for rank in (2, 4, 8, 16)])
    cohort = Cohort.of(backbone, MIX, seed=7)
    for member, configuration in enumerate(MIX):
        backbone.activate(configuration, seed=7)
        ours, expected = cohort.state(member), backbone.adapter_state()
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[name], expected[name]) for name in expected)
    check(backbone, MIX)


def test_dropout_is_drawn_as_for_a_candidate_alone(tiny_backbone: Callable[..., Backbone]) -> None:
    check(tiny_backbone("llama", bits=(2, 4, 8), adapter=AdapterOptions(dropout=0.3)), MIX)


def test_gradient_checkpointing_changes_nothing(tiny_backbone: Callable[..., Backbone]) -> None:
    backbone = tiny_backbone("llama", bits=(2, 4, 8))
    plain = together(backbone, MIX)[0]
    backbone.enable_gradient_checkpointing()
    torch.testing.assert_close(together(backbone, MIX)[0], plain, rtol=1e-6, atol=0)


def test_layers_without_an_adapter_stand_beside_layers_with_one(tiny_backbone: Callable[..., Backbone]) -> None:
    members = (Configuration.of([2, 4, 8], [0, 8, 0]), Configuration.of([4, 4, 2], [0, 0, 4]))
    check(tiny_backbone("llama", bits=(2, 4, 8)), members)


def test_a_compute_dtype_of_16_bits_is_kept(tiny_backbone: Callable[..., Backbone]) -> None:
    backbone = tiny_backbone("llama", bits=(2, 4, 8), compute_dtype="bfloat16")
    check(backbone, MIX[:2], tolerance=2e-2)


def test_padding_of_smaller_ranks_stays_zero(tiny_backbone: Callable[..., Backbone]) -> None:
    backbone = tiny_backbone("llama", bits=(2, 4, 8))
    backbone.model.train()
    _, cohort = together(backbone, MIX)
    ranks = [configuration.layers[0].rank for configuration in MIX]
    first = [p for name, p in cohort.parameters() if ".layers.0." in name]
    assert first
    for parameter in first:
        stacked = parameter if parameter.shape[1] == max(ranks) else parameter.transpose(1, 2)
        for member, rank in enumerate(ranks):
            assert not stacked[member, rank:].any()
            assert stacked[member, :rank].any()


def test_the_gradient_norm_is_clipped_for_each_candidate_by_itself(tiny_backbone: Callable[..., Backbone]) -> None:
    cohort = Cohort.of(tiny_backbone("llama", bits=(2, 4, 8)), MIX[:2], seed=0)
    for _, parameter in cohort.parameters():
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad[0] = 1e-4  # small: not clipped
        parameter.grad[1] = 3.0
    before = [p.grad.clone() for _, p in cohort.parameters() if p.grad is not None]
    cohort.clip_gradients(1.0)
    after = [p.grad for _, p in cohort.parameters() if p.grad is not None]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(after, before, strict=True))
    assert sum(float(a[1].square().sum()) for a in after) == pytest.approx(1.0)
    cohort.clip_gradients(0.001, "value")
    assert max(float(a.abs().max()) for a in after) == pytest.approx(0.001)


def test_a_candidate_that_diverges_harms_no_other(tiny_backbone: Callable[..., Backbone]) -> None:
    backbone = tiny_backbone("llama", bits=(2, 4, 8))
    backbone.model.train()
    expected = together(backbone, MIX[:2])[1].state(1)
    cohort = Cohort.of(backbone, MIX[:2], seed=7)
    with torch.no_grad():
        for _, parameter in cohort.parameters():
            parameter[0] = torch.nan
    optimizer = AdamW([p for _, p in cohort.parameters()], lr=1e-2)
    with cohort.installed() as model:
        for batch in batches():
            losses = loss_of(model, batch, 2)
            assert losses.isfinite().tolist() == [False, True]
            losses.sum().backward()
            cohort.clip_gradients(CLIP)
            optimizer.step()
            optimizer.zero_grad()
    found = cohort.state(1)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_states_and_moments_of_a_candidate_come_back_into_another_cohort(
    tiny_backbone: Callable[..., Backbone],
) -> None:
    backbone = tiny_backbone("llama", bits=(2, 4, 8))
    backbone.model.train()
    cohort = Cohort.of(backbone, MIX, seed=7)
    optimizer = AdamW([p for _, p in cohort.parameters()], lr=1e-2)
    with cohort.installed() as model:
        loss_of(model, batches()[0], len(cohort)).sum().backward()
    optimizer.step()
    states = [cohort.state(member) for member in (2, 1)]
    moments = [cohort.moments(optimizer, member) for member in (2, 1)]
    other = Cohort.of(backbone, [MIX[2], MIX[1]], seed=99)
    later = AdamW([p for _, p in other.parameters()], lr=1e-2)
    for member, state in enumerate(states):
        other.load_state(member, state)
    other.load_moments(later, moments)
    for member in range(2):
        again = other.moments(later, member)
        assert again.keys() == moments[member].keys()
        assert all(torch.equal(again[key], moments[member][key]) for key in again)
        assert all(torch.equal(other.state(member)[name], value) for name, value in states[member].items())
    with pytest.raises(ConfigurationError, match="not of configuration"):
        other.load_state(0, {"elsewhere": torch.zeros(1)})


def test_scoring_happens_with_the_stored_16_bits_and_masters_return(tiny_backbone: Callable[..., Backbone]) -> None:
    backbone = tiny_backbone("llama", bits=(2, 4, 8))
    _, cohort = together(backbone, MIX)
    masters = [p.detach().clone() for _, p in cohort.parameters()]
    with cohort.stored_precision():
        assert all(torch.equal(p, m.bfloat16().float()) for (_, p), m in zip(cohort.parameters(), masters, strict=True))
        assert any(not torch.equal(p, m) for (_, p), m in zip(cohort.parameters(), masters, strict=True))
    assert all(torch.equal(p, m) for (_, p), m in zip(cohort.parameters(), masters, strict=True))


def test_the_model_is_as_before_after_a_cohort_even_when_it_failed(tiny_backbone: Callable[..., Backbone]) -> None:
    backbone = tiny_backbone("llama", bits=(2, 4, 8))
    backbone.activate(MIX[0], seed=0)
    ids = torch.arange(3, 15)[None]
    before = backbone.model(input_ids=ids).logits
    names = [name for name, _ in backbone.model.named_modules()]
    with pytest.raises(ZeroDivisionError), Cohort.of(backbone, MIX, seed=1).installed():
        raise ZeroDivisionError
    assert [name for name, _ in backbone.model.named_modules()] == names
    assert torch.equal(backbone.model(input_ids=ids).logits, before)


def test_a_cohort_of_what_the_bank_lacks_is_refused(tiny_backbone: Callable[..., Backbone]) -> None:
    backbone = tiny_backbone("llama", bits=(2, 4))
    with pytest.raises(QuantizationError, match="8"):
        Cohort.of(backbone, MIX, seed=0)
    with pytest.raises(ConfigurationError, match="3 layers"):
        Cohort.of(backbone, [Configuration.uniform(4, 2, 5)], seed=0)
    with pytest.raises(ConfigurationError, match="at least one"):
        Cohort.of(backbone, [], seed=0)
