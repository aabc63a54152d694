"""Adapters trained wide and stored narrow: the best cut there is, within the bytes that are counted."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qratk.adapters.cut import Cut
from qratk.adapters.lora import Lora
from qratk.adapters.matrices.directions import Directions, dealt, directions
from qratk.adapters.matrices.moments import MOMENT, second_moment
from qratk.adapters.options import AdapterOptions
from qratk.core import Configuration, ConfigurationError, LayerBytes, MemoryModel, SearchSpace
from qratk.core.memory import PeakBytes

WIDTH, D_IN, D_OUT = 6, 20, 12


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair() -> tuple[Tensor, Tensor]:
    return drawn(WIDTH, D_IN, seed=1), drawn(D_OUT, WIDTH, seed=2)


def covariance() -> Tensor:
    """Second moments of inputs that come from some directions much more than from others."""
    root = drawn(D_IN, D_IN, seed=3) * torch.linspace(0.05, 3.0, D_IN)
    return (root @ root.T).double()


def error(a: Tensor, b: Tensor, found: Directions, rank: int, inputs: Tensor) -> float:
    """Mean squared error of the outputs, by inputs of these second moments."""
    first, second = found.first(rank)
    lost = (b @ a - second @ first).double()
    return float(torch.trace(lost @ inputs @ lost.T))


@pytest.mark.parametrize("rank", range(1, WIDTH + 1))
def test_the_plain_cut_is_the_truncated_decomposition(rank: int) -> None:
    a, b = pair()
    left, values, right = torch.linalg.svd((b @ a).double(), full_matrices=False)
    first, second = directions(a, b).first(rank)
    best = (left[:, :rank] * values[:rank]) @ right[:rank]
    torch.testing.assert_close(second @ first, best.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", range(1, WIDTH))
def test_the_error_of_a_cut_by_the_inputs_is_the_least_there_is(rank: int) -> None:
    a, b = pair()
    inputs = covariance()
    weights, vectors = torch.linalg.eigh(inputs)
    values = torch.linalg.svdvals((b @ a).double() @ vectors @ weights.sqrt().diag())  # the best of all matrices
    moment = a.double() @ inputs @ a.T.double()
    found = directions(a, b, moment)
    least = float((values[rank:] ** 2).sum())
    assert error(a, b, found, rank, inputs) == pytest.approx(least, rel=1e-4)
    assert float((found.values[rank:] ** 2).sum()) == pytest.approx(least, rel=1e-6)
    assert error(a, b, directions(a, b), rank, inputs) > 1.01 * least


def test_moments_that_are_singular_and_pairs_that_are_zero_are_cut_too() -> None:
    a, b = pair()
    z = drawn(2, WIDTH, seed=5)
    found = directions(a, b, z.T @ z)
    first, second = found.first(2)
    inputs = torch.linalg.pinv(a) @ z.T  # what makes z
    torch.testing.assert_close(second @ first @ inputs, b @ z.T, rtol=1e-3, atol=1e-3)
    nothing = directions(a, torch.zeros_like(b))
    assert not nothing.values.any()
    assert not nothing.b.any()
    assert torch.isfinite(nothing.a).all()


def test_a_projection_that_no_token_reached_is_cut_plainly_and_claims_nothing() -> None:
    a, b = pair()
    unseen, plain = directions(a, b, torch.zeros(WIDTH, WIDTH)), directions(a, b)
    assert torch.equal(unseen.a, plain.a)
    assert not unseen.values.any()


def test_what_is_not_finite_stays_so_without_an_error() -> None:
    a, b = pair()
    b[0, 0] = torch.inf
    assert torch.isnan(directions(a, b).b).all()


def test_lengths_are_shared_out_between_both_matrices() -> None:
    found = directions(*pair())
    torch.testing.assert_close(found.a.norm(dim=1), found.b.norm(dim=0))


def found_of(values: list[float], cost: int) -> Directions:
    count = len(values)
    return Directions(torch.zeros(count, cost - 1), torch.zeros(1, count), np.array(values))


def worth(ranks: list[int], of: list[Directions]) -> float:
    return sum(float((each.values[:rank] ** 2).sum()) for rank, each in zip(ranks, of, strict=True))


@pytest.mark.parametrize("limit", range(0, 60, 3))
def test_bytes_are_dealt_out_within_the_limit_and_within_one_direction_of_the_best(limit: int) -> None:
    draw = np.random.default_rng(limit)
    costs = [3, 5, 9]
    of = [found_of(sorted(draw.exponential(size=4), reverse=True), cost) for cost in costs]
    ranks = dealt(of, costs, limit)
    assert sum(rank * cost for rank, cost in zip(ranks, costs, strict=True)) <= limit
    fitting = [
        list(choice)
        for choice in itertools.product(range(5), repeat=3)
        if sum(rank * cost for rank, cost in zip(choice, costs, strict=True)) <= limit
    ]
    best = max(worth(choice, of) for choice in fitting)
    assert worth(ranks, of) <= best + 1e-12
    assert worth(ranks, of) >= best - max(float(each.values[0] ** 2) for each in of)


def state() -> dict[str, Tensor]:
    """A trained pair each of two projections in two blocks, of which the second block's matters more."""
    found = {}
    for index, block in enumerate((0, 0, 1, 1)):
        name = f"model.layers.{block}.mlp.p{index}"
        found[f"{name}.lora_A.weight"] = drawn(WIDTH, D_IN, seed=10 + index)
        found[f"{name}.lora_B.weight"] = drawn(D_OUT, WIDTH, seed=20 + index) * (1 + 2 * block + index)
    return found


def cut(method: Cut, rank: int = 3, **options: Any) -> dict[str, tuple[Tensor, Tensor]]:
    names = [key.removesuffix(".lora_A.weight") for key in state() if key.endswith("lora_A.weight")]
    return method.cut(state(), dict.fromkeys(names, rank), AdapterOptions(**options))


def test_each_projection_keeps_its_own_rank_or_shares_bytes_with_its_block_or_with_all() -> None:
    whole = {name: len(a) for name, (a, _) in cut(Cut(allocation="projection")).items()}
    block = {name: len(a) for name, (a, _) in cut(Cut(allocation="block")).items()}
    model = {name: len(a) for name, (a, _) in cut(Cut(allocation="model")).items()}
    assert set(whole.values()) == {3}
    assert [sum(rank for name, rank in block.items() if f".{index}." in name) for index in (0, 1)] == [6, 6]
    assert len(set(block.values())) > 1
    assert sum(model.values()) == 12
    assert sum(rank for name, rank in model.items() if ".1." in name) > 6


def test_a_cut_to_the_width_changes_nothing() -> None:
    for name, (a, b) in cut(Cut(width=WIDTH), rank=WIDTH).items():
        before = state()[f"{name}.lora_B.weight"] @ state()[f"{name}.lora_A.weight"]
        torch.testing.assert_close(b @ a, before, rtol=1e-4, atol=1e-4)


def test_a_scaling_that_depends_on_the_rank_is_made_up_for() -> None:
    options = AdapterOptions(rslora=True)
    plain, scaled = cut(Cut(width=WIDTH)), cut(Cut(width=WIDTH), rslora=True)
    for name, (a, b) in scaled.items():
        expected = options.scaling(WIDTH) * (plain[name][1] @ plain[name][0])
        torch.testing.assert_close(options.scaling(len(a)) * (b @ a), expected, rtol=1e-5, atol=1e-5)


def test_moments_decide_the_cut() -> None:
    z = drawn(50, WIDTH, seed=7) * torch.tensor([5.0, 1, 1, 1, 1, 0.1])
    moments = {key.replace(".lora_A.weight", MOMENT): z.T @ z for key in state() if "lora_A" in key}
    ranks = {key.removesuffix(MOMENT): 2 for key in moments}
    plain = Cut().cut(state(), ranks, AdapterOptions())
    seen = Cut().cut({**state(), **moments}, ranks, AdapterOptions())
    assert all(not torch.allclose(seen[name][1], plain[name][1]) for name in plain)


def test_every_rank_over_0_is_trained_at_the_width_and_no_rank_below_its_own() -> None:
    assert Cut(width=16).trained(Configuration.from_text("4:2 2:8 8:0 4:32")) == Configuration.from_text(
        "4:16 2:16 8:0 4:32"
    )
    assert Lora().trained(Configuration.from_text("4:2")) == Configuration.from_text("4:2")


def test_weights_packed_for_each_rank_and_wrong_options_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="init_iterations"):
        Cut().check(AdapterOptions(init="loftq", init_iterations=2))
    for wrong in ({"width": 0}, {"batches": 0}, {"metric": "none"}, {"allocation": "layer"}):
        with pytest.raises(ConfigurationError):
            Cut(**wrong)  # type: ignore[arg-type]


def test_an_estimated_training_peak_counts_the_width() -> None:
    space = SearchSpace((4,), (0, 2, 8, 32), ("a", "b"))
    layers = tuple(LayerBytes({4: 100}, {4: 10}, {r: 2 * r * size for r in space.ranks}) for size in (30, 50))
    plain = MemoryModel(space, layers, (1, 1), training=PeakBytes(1000, 7.0))
    wide = Cut(width=16).training_memory(plain)
    for bits, rank, as_if in ((4, 0, 0), (4, 32, 32)):
        assert wide.bytes(space.uniform(bits, rank), "training") == plain.bytes(space.uniform(bits, as_if), "training")
    assert wide.bytes(space.uniform(4, 2), "training") == wide.bytes(space.uniform(4, 8), "training")
    adapters = 16 * 16 * (30 + 50)  # bytes of a number in training, rank, numbers of a rank
    assert wide.bytes(space.uniform(4, 8), "training") == 1000 + 2 * (100 + 10) + adapters
    assert wide.bytes(space.uniform(4, 8), "storage") == plain.bytes(space.uniform(4, 8), "storage")


def test_second_moments_leave_padding_out() -> None:
    z, mask = drawn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]])
    real = torch.stack([z[0, 0], z[0, 1], z[1, 0]])
    torch.testing.assert_close(second_moment(z, mask), real.T @ real)
    stacked = torch.stack([z.flatten(0, 1), 2 * z.flatten(0, 1)])  # two candidates
    torch.testing.assert_close(second_moment(stacked, mask), torch.stack([real.T @ real, 4 * real.T @ real]))
    gathered = drawn(5, 4)  # of an expert
    torch.testing.assert_close(second_moment(gathered, mask), gathered.T @ gathered)
