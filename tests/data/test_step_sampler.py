from __future__ import annotations

import itertools

import pytest
import torch

from qratk.core import DataError
from qratk.data import StepSampler


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
    orders = {
        tuple(StepSampler(30, 1, seed=seed).permutation(epoch).tolist()) for seed in range(5) for epoch in range(5)
    }
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
