"""AdaLoRA against PEFT: the same directions survive the same gradients, and matrices have the same penalty."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from qratk.adapters.adalora import AdaLora, AdaLoraAdapters
from qratk.adapters.base import adapters
from qratk.adapters.matrices.singular import select
from qratk.adapters.options import AdapterOptions
from qratk.core import Configuration, ConfigurationError, SearchSpace
from qratk.peaks.foretold import memory_model
from qratk.training.cohort import Cohort

STEPS = 20


def made(tiny_backbone: Callable[..., Any], rank: int = 4, **options: Any) -> Any:
    given = {"delta_t": 3, "limit_bytes": False, **options}
    backbone = tiny_backbone("llama", layers=2, bits=(4,), method=AdaLora(**given))
    backbone.activate(Configuration.uniform(4, rank, 2), seed=3)
    return backbone


def disturbed(parts: list[torch.Tensor], generator: torch.Generator) -> None:
    """New gradients and values, as if a step had been made."""
    with torch.no_grad():
        for part in parts:
            part.grad = torch.randn(part.shape, generator=generator)
            part.add_(torch.randn(part.shape, generator=generator), alpha=0.1)


class PeftTwin(nn.Module):
    """The same three tensors of each projection under PEFT's names, Lambda as a column."""

    def __init__(self, triplets: Any) -> None:
        super().__init__()
        for index, one in enumerate(triplets):
            for key, tensor in (("lora_A", one.q), ("lora_B", one.p), ("lora_E", one.values[:, None])):
                holder = nn.ParameterDict({"default": nn.Parameter(tensor.detach().clone())})
                self.add_module(f"m{index:02d}_{key}", holder)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        for name, parameter in super().named_parameters(*args, **kwargs):
            module, key = name.split("_", 1)
            yield f"{module}.{key}", parameter

    def of(self, key: str) -> list[torch.Tensor]:
        return [p for n, p in self.named_parameters() if key in n]


def test_the_same_directions_survive_as_with_pefts_allocator(tiny_backbone: Callable[..., Any]) -> None:
    from peft.tuners.adalora.layer import RankAllocator as PeftAllocator
    from peft.tuners.adalora.model import AdaLoraModel

    backbone = made(tiny_backbone)
    triplets = backbone.adapters.triplets()
    ours = backbone.adapters.after_steps(STEPS)
    twin = PeftTwin(triplets)
    config = SimpleNamespace(
        beta1=0.85, beta2=0.85, target_r=4, tinit=2, tfinal=10, total_step=STEPS, deltaT=3, rank_pattern=None
    )
    theirs = PeftAllocator(twin, config, "default")
    tuner = SimpleNamespace(
        peft_config={"default": config}, trainable_adapter_name="default", rankallocator=theirs, model=twin
    )
    assert (ours.first, ours.last) == (config.tinit, STEPS - config.tfinal)
    generator = torch.Generator().manual_seed(0)
    left = []
    for step in range(1, STEPS + 1):
        for key, part in (("lora_A", "q"), ("lora_B", "p"), ("lora_E", "values")):
            own = [getattr(one, part) for one in triplets]
            disturbed(own, generator)
            with torch.no_grad():
                for mine, other in zip(own, twin.of(key), strict=True):
                    other.copy_(mine.reshape(other.shape))
                    other.grad = mine.grad.reshape(other.shape).clone()
        assert ours.budget(step)[0] == theirs.budget_schedule(step)[0]
        ours.step(step)
        AdaLoraModel.update_and_allocate(tuner, step)
        for mine, other in zip(triplets, twin.of("lora_E"), strict=True):
            torch.testing.assert_close(mine.values[:, None], other, rtol=0, atol=0)
        left.append([int((one.values != 0).sum()) for one in triplets])
    assert sum(left[0]) == 14 * 6
    assert sum(left[-1]) == 14 * 4
    assert len(set(left[-1])) > 1
    assert sum(left[2]) < 14 * 6  # between: the cubic schedule has begun
    assert sum(left[2]) > sum(left[8])


def test_averages_are_those_of_the_paper(tiny_backbone: Callable[..., Any]) -> None:
    backbone = made(tiny_backbone, beta1=0.7, beta2=0.6)
    allocator = backbone.adapters.after_steps(1000)
    one = allocator.triplets[3]
    generator = torch.Generator().manual_seed(1)
    smooth, uncertain = np.zeros(one.q.shape), np.zeros(one.q.shape)
    for step in range(1, 6):
        disturbed([part for t in allocator.triplets for _, part in t.parts()], generator)
        sensitivity = np.abs(one.q.detach().double().numpy() * one.q.grad.double().numpy())
        smooth = 0.7 * smooth + 0.3 * sensitivity
        uncertain = 0.6 * uncertain + 0.4 * np.abs(sensitivity - smooth)
        allocator.step(step)
    state = allocator.state()
    np.testing.assert_allclose(state[f"adalora/sensitivity/{one.name}.q"], smooth, rtol=1e-5)
    np.testing.assert_allclose(state[f"adalora/uncertainty/{one.name}.q"], uncertain, rtol=1e-4, atol=1e-7)


def test_importance_of_a_direction_is_that_of_its_value_and_the_means_of_its_vectors(
    tiny_backbone: Callable[..., Any],
) -> None:
    backbone = made(tiny_backbone)
    allocator = backbone.adapters.after_steps(1000)
    disturbed([part for t in allocator.triplets for _, part in t.parts()], torch.Generator().manual_seed(2))
    allocator.step(1)
    state = allocator.state()
    one = allocator.triplets[5]
    p, values, q = (
        state[f"adalora/sensitivity/{name}"] * state[f"adalora/uncertainty/{name}"] for name, _ in one.parts()
    )
    expected = [float(values[i] + p[:, i].mean() + q[i].mean()) for i in range(len(values))]
    np.testing.assert_allclose(allocator.importance()[5].numpy(), expected, rtol=1e-5)


def test_penalty_is_the_one_that_peft_adds_to_the_loss(tiny_backbone: Callable[..., Any]) -> None:
    from peft.tuners.adalora.model import AdaLoraModel

    class Outputs(nn.Module):
        def forward(self) -> Any:
            return SimpleNamespace(loss=torch.tensor(0.0))

    backbone = made(tiny_backbone)
    twin = PeftTwin(backbone.adapters.triplets())
    outer = Outputs()
    outer.named_parameters = twin.named_parameters  # type: ignore[method-assign]
    tuner = SimpleNamespace(
        model=outer, peft_config={"default": SimpleNamespace(orth_reg_weight=0.5)}, trainable_adapter_name="default"
    )
    penalty = backbone.adapters.penalty()
    torch.testing.assert_close(penalty, AdaLoraModel.forward(tuner).loss)
    penalty.backward()
    grads = [p.grad for n, p in backbone.trainable_parameters() if "lora_E" not in n]
    assert all(g is not None and torch.isfinite(g).all() and g.abs().sum() > 0 for g in grads)


def test_adapters_begin_without_effect_and_nested_in_rank(
    tiny_backbone: Callable[..., Any], tiny_batch: dict[str, Any]
) -> None:
    backbone = made(tiny_backbone, rank=8)
    large = {t.name: t for t in backbone.adapters.triplets()}
    assert {len(t.kept) for t in large.values()} == {12}
    with torch.no_grad():
        adapted = backbone.model(**tiny_batch).logits
    backbone.activate(Configuration.uniform(4, 4, 2), seed=3)
    for small in backbone.adapters.triplets():
        assert len(small.kept) == 6
        assert torch.equal(small.q, large[small.name].q[:6])
        assert torch.equal(small.p, large[small.name].p[:, :6])
    backbone.activate(Configuration.uniform(4, 0, 2), seed=3)
    with torch.no_grad():
        assert torch.equal(backbone.model(**tiny_batch).logits, adapted)
    assert backbone.adapters.triplets() == []


def test_the_layer_multiplies_by_p_lambda_q(tiny_backbone: Callable[..., Any], tiny_batch: dict[str, Any]) -> None:
    backbone = made(tiny_backbone)
    disturbed([part for t in backbone.adapters.triplets() for _, part in t.parts()], torch.Generator().manual_seed(4))
    name, bank = next(iter(backbone.banks.items()))
    wrapper = backbone.base.get_submodule(name)
    x = torch.randn(3, bank.in_features, generator=torch.Generator().manual_seed(5))
    one = backbone.adapters.triplets()[0]
    delta = 2.0 * one.p @ torch.diag(one.values) @ one.q
    with torch.no_grad():
        torch.testing.assert_close(wrapper(x), bank(x) + x @ delta.t())
    torch.testing.assert_close(backbone.adapters.delta(name), delta.detach())


def test_scoring_uses_what_is_stored_and_training_goes_on_with_the_masters(
    tiny_backbone: Callable[..., Any], tiny_batch: dict[str, Any]
) -> None:
    backbone = made(tiny_backbone)
    adapters = backbone.adapters
    triplets = adapters.triplets()
    disturbed([part for t in triplets for _, part in t.parts()], torch.Generator().manual_seed(6))
    for index, one in enumerate(triplets):
        one.kept[: index % 7] = False  # some projections lose all their directions
    before = adapters.state()
    parameters = [id(p) for _, p in adapters.parameters()]
    assert adapters.rank(triplets[6].name) == 0
    with adapters.stored_precision():
        with torch.no_grad():
            scored = backbone.model(**tiny_batch).logits
        assert {n: p.shape[0] for n, p in adapters.parameters() if "lora_A" in n} == {
            f"{t.name}.lora_A.weight": int(t.kept.sum()) for t in triplets
        }
        stored = adapters.stored_tensors()
    after = adapters.state()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [id(p) for _, p in adapters.parameters()] == parameters
    assert {n: t.shape for n, t in stored.items()} == {n: t.shape for n, t in adapters.stored_tensors().items()}
    assert all(t.dtype == torch.bfloat16 for t in stored.values())
    assert sum(t.nbytes for t in stored.values()) == 2 * sum(adapters.rank(t.name) * t.cost for t in triplets)
    with torch.no_grad():
        for one in triplets:  # the same by hand
            one.p.copy_((one.p * one.values * one.kept).bfloat16())
            one.q.copy_(one.q.bfloat16())
            one.values.fill_(1.0)
        torch.testing.assert_close(backbone.model(**tiny_batch).logits, scored)


def best_by_force(scores: Any, costs: Any, count: int, limit: int) -> tuple[int, ...]:
    """The selection that comes first when each entry, from the highest score down, is kept if at all possible."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    fitting = [c for c in itertools.combinations(range(len(scores)), count) if sum(costs[i] for i in c) <= limit]
    return min(fitting, key=lambda chosen: [i not in chosen for i in order])


@pytest.mark.parametrize("seed", range(20))
def test_selection_is_the_first_in_order_of_score_that_fits(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, costs = rng.integers(0, 6, 9).astype(float), rng.choice([3, 5, 11], 9)
    count = int(rng.integers(1, 9))
    least = int(np.sort(costs)[:count].sum())
    limit = int(rng.integers(least, int(np.sort(costs)[-count:].sum()) + 1))
    chosen = select(scores, costs, count, limit)
    assert tuple(np.flatnonzero(chosen)) == best_by_force(scores, costs, count, limit)


def test_selection_that_cannot_fit_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="fit"):
        select([1.0, 2.0, 3.0], np.array([5, 5, 7]), 2, 9)


def test_selection_puts_what_is_no_number_last() -> None:
    assert select([np.nan, 1.0, 2.0], np.array([1, 1, 1]), 2, 3).tolist() == [False, True, True]


@pytest.mark.parametrize("ranks", [(4, 4), (2, 8), (3, 0)])
def test_ranks_end_within_the_bytes_wherever_importance_lies(
    tiny_backbone: Callable[..., Any], ranks: tuple[int, int]
) -> None:
    backbone = made(tiny_backbone, limit_bytes=True, delta_t=1)
    configuration = Configuration.of((4, 4), ranks)
    backbone.activate(configuration, seed=0)
    adapters = backbone.adapters
    allocator = adapters.after_steps(10)
    generator = torch.Generator().manual_seed(7)
    for step in range(1, 11):
        for one in allocator.triplets:  # the dearest projections matter most
            disturbed([part for _, part in one.parts()], generator)
            for _, part in one.parts():
                part.grad.mul_(one.cost)
        allocator.step(step)
    names = tuple(shape.name for shape in backbone.shapes)
    space = SearchSpace((4,), tuple(sorted(set(ranks))), names)
    allowed = memory_model(backbone, space, trace=False).footprint(configuration).adapters
    assert sum(adapters.rank(name) for name in adapters.banks) == 7 * sum(ranks)
    assert sum(t.nbytes for t in adapters.stored_tensors().values()) <= allowed
    costs = {t.name: t.cost for t in allocator.triplets}
    uncapped = select(
        np.concatenate([np.full(len(t.kept), t.cost) for t in allocator.triplets]),
        np.repeat(list(costs.values()), [len(t.kept) for t in allocator.triplets]),
        7 * sum(ranks),
        10**9,
    )
    spent = np.repeat(list(costs.values()), [len(t.kept) for t in allocator.triplets])[uncapped].sum()
    assert 2 * spent > allowed  # the limit was needed


def test_allocation_ends_at_the_same_step_wherever_training_stops(tiny_backbone: Callable[..., Any]) -> None:
    backbone = made(tiny_backbone, tinit=0.1, tfinal=0.5)
    allocator = backbone.adapters.after_steps(900)
    assert (allocator.first, allocator.last) == (90, 450)
    start, end = 14 * 6, 14 * 4
    expected = [start, start, int(end + (start - end) * 0.5**3), end, end]
    assert [allocator.budget(step)[0] for step in (1, 90, 270, 450, 900)] == expected


@pytest.mark.parametrize("total", range(1, 12))
def test_the_shortest_schedules_reach_the_budget(tiny_backbone: Callable[..., Any], total: int) -> None:
    backbone = made(tiny_backbone, delta_t=10)
    allocator = backbone.adapters.after_steps(total)
    generator = torch.Generator().manual_seed(8)
    for step in range(1, total + 1):
        disturbed([part for t in allocator.triplets for _, part in t.parts()], generator)
        allocator.step(step)
    assert sum(int(t.kept.sum()) for t in allocator.triplets) == 14 * 4
    assert all((t.values[~t.kept] == 0).all() for t in allocator.triplets)
    assert allocator.state() == {}


def test_projections_without_a_gradient_matter_least(tiny_backbone: Callable[..., Any]) -> None:
    backbone = made(tiny_backbone)
    allocator = backbone.adapters.after_steps(4)
    unused, *used = allocator.triplets
    for step in (1, 2):
        disturbed([part for t in used for _, part in t.parts()], torch.Generator().manual_seed(step))
        allocator.step(step)
    assert int(unused.kept.sum()) == 0
    assert sum(int(t.kept.sum()) for t in used) == 14 * 4


def test_masters_of_plain_lora_are_refused(tiny_backbone: Callable[..., Any]) -> None:
    plain = tiny_backbone("llama", layers=2, bits=(4,))
    plain.activate(Configuration.uniform(4, 4, 2), seed=3)
    backbone = made(tiny_backbone)
    with pytest.raises(ConfigurationError, match="adalora"):
        backbone.load_adapter_state(plain.adapter_state())
    assert isinstance(backbone.adapters, AdaLoraAdapters)


def test_training_takes_more_memory_and_storage_the_same(tiny_backbone: Callable[..., Any]) -> None:
    plain, backbone = tiny_backbone("llama", layers=2, bits=(4,)), made(tiny_backbone)
    space = SearchSpace((4,), (0, 4, 8), tuple(shape.name for shape in plain.shapes))
    lora, ours = (memory_model(b, space, batch_size=2, sequence_length=8) for b in (plain, backbone))
    for rank in (0, 4, 8):
        configuration = Configuration.uniform(4, rank, 2)
        before, after = lora.footprint(configuration), ours.footprint(configuration)
        assert after.storage_bytes == before.storage_bytes
        numbers = before.adapters // 2
        assert after.training_bytes - before.training_bytes == numbers * (24 * 1.5 - 16)
        assert after.training_bytes >= before.total_bytes + numbers * (24 * 1.5 - 2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"init_rank_factor": 0.5},
        {"tinit": 0.6, "tfinal": 0.5},
        {"delta_t": 0},
        {"beta1": 1.0},
        {"orth_reg_weight": -0.1},
        {"total_step": 3},
    ],
)
def test_wrong_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        adapters.create("adalora", **wrong)


def test_a_cohort_and_other_beginnings_are_refused(tiny_backbone: Callable[..., Any]) -> None:
    backbone = made(tiny_backbone)
    with pytest.raises(ConfigurationError, match="one by one"):
        Cohort.of(backbone, [Configuration.uniform(4, 4, 2)] * 2, seed=0)
    for options in (AdapterOptions(init="loftq"), AdapterOptions(input_groups=32)):
        with pytest.raises(ConfigurationError, match="of its own"):
            tiny_backbone("llama", layers=2, adapter=options, method=AdaLora())
