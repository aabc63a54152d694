from __future__ import annotations

import itertools

import pytest
import torch

from qratk.core import DataError
from qratk.data import StepSampler
from qratk.data.order import Endless, Mixture


def first(sampler: StepSampler, count: int) -> list[list[int]]:
    return list(itertools.islice(sampler, count))


@pytest.mark.parametrize(("items", "size"), [(10, 3), (7, 7), (3, 8), (1, 2), (12, 4)])
def test_every_item_comes_once_in_each_epoch_of_the_stream(items: int, size: int) -> None:
    stream = [index for batch in first(StepSampler(items, size, seed=1), 3 * items) for index in batch]
    for epoch in range(3):
        assert sorted(stream[epoch * items : (epoch + 1) * items]) == list(range(items))


def test_every_batch_is_full() -> None:
    assert {len(batch) for batch in first(StepSampler(10, 4, seed=0), 20)} == {4}


@pytest.mark.parametrize("start", [1, 3, 4, 17])
def test_a_restarted_sampler_continues_the_same_sequence(start: int) -> None:
    whole = first(StepSampler(10, 3, seed=2), 30)
    assert first(StepSampler(10, 3, seed=2, start=start), 30 - start) == whole[start:]


def test_the_sequence_does_not_depend_on_the_global_generator_and_leaves_it_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a = first(StepSampler(50, 8, seed=3), 20)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert first(StepSampler(50, 8, seed=3), 20) == a


def test_seeds_and_epochs_give_different_orders() -> None:
    orders = {tuple(Endless(30, seed).permutation(epoch).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_replicas_share_out_the_sequence_of_one() -> None:
    whole = first(StepSampler(10, 3, seed=2), 12)
    shares = [first(StepSampler(10, 3, seed=2, rank=rank, replicas=3), 4) for rank in range(3)]
    assert [share[k] for k in range(4) for share in shares] == whole


@pytest.mark.parametrize("length", [None, 4])
def test_a_pass_begins_behind_what_was_trained_on(length: int | None) -> None:
    done = 0
    sampler = StepSampler(10, 3, seed=2, start=1, length=length, done=lambda: done)
    batches = []
    for count in (4, 2, 3):  # the Trainer may end a pass before its end
        batches += first(sampler, count)
        done += count
    assert batches == first(StepSampler(10, 3, seed=2, start=1), 9)


def test_a_sampler_with_a_length_ends() -> None:
    sampler = StepSampler(10, 3, seed=2, length=4)
    assert len(sampler) == len(list(sampler)) == 4


def test_an_endless_sampler_has_no_length() -> None:
    with pytest.raises(TypeError, match="max_steps"):
        len(StepSampler(10, 3, seed=2))


@pytest.mark.parametrize("arguments", [(0, 1, 0), (1, 0, 0), (1, 1, 0, -1)])
def test_impossible_sizes_are_refused(arguments: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="sampler needs"):
        StepSampler(*arguments)


MIXTURE = Mixture((7, 40, 3), (1.0, 2.0, 0.5))


def test_a_mixture_is_a_function_of_seed_and_place() -> None:
    whole = [row for batch in first(StepSampler(50, 4, seed=3, mixture=MIXTURE), 300) for row in batch]
    other = [row for batch in first(StepSampler(50, 6, seed=3, mixture=MIXTURE), 200) for row in batch]
    assert whole == other
    assert first(StepSampler(50, 4, seed=3, start=170, mixture=MIXTURE), 5) == [
        whole[4 * k : 4 * k + 4] for k in range(170, 175)
    ]
    shares = [first(StepSampler(50, 4, seed=3, rank=r, replicas=2, mixture=MIXTURE), 10) for r in range(2)]
    assert [row for k in range(10) for share in shares for row in share[k]] == whole[:80]


def test_a_mixture_keeps_its_shares_and_goes_through_each_source() -> None:
    rows = [row for batch in first(StepSampler(50, 256, seed=3, mixture=MIXTURE), 14) for row in batch]
    sources = [[row for row in rows if low <= row < high] for low, high in ((0, 7), (7, 47), (47, 50))]
    assert [len(rows) for rows in sources] == [1024, 2048, 512]
    for own, size in zip(sources, MIXTURE.sizes, strict=True):
        epochs = [own[start : start + size] for start in range(0, len(own) - size + 1, size)]
        assert all(len(set(epoch)) == size for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 1
    batch = [sum(row < 7 for row in rows[start : start + 8]) for start in range(0, 1024, 8)]
    assert len(set(batch)) > 2  # drawn, not dealt out


def test_seeds_mix_in_other_orders() -> None:
    orders = {tuple(StepSampler(50, 50, seed=seed, mixture=MIXTURE).batch(0)) for seed in range(5)}
    assert len(orders) == 5


def test_a_rare_source_comes_by_its_share() -> None:
    mixture = Mixture((5, 5), (1.0, 2999.0))
    rows = StepSampler(10, 30_000, seed=0, mixture=mixture).batch(0)
    assert sum(row < 5 for row in rows) == 10


@pytest.mark.parametrize("weights", [(0.0, 1.0), (-1.0, 1.0), (float("nan"), 1.0), (1.0, 1e9)])
def test_weights_that_cannot_be_are_refused(weights: tuple[float, float]) -> None:
    with pytest.raises(DataError, match="weight"):
        Mixture((2, 2), weights)
