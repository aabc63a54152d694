"""The dense cache: what stays, what goes, within which allowance."""

from __future__ import annotations

import copy

import pytest
import torch

from qratk.bank.dense import DenseCache, available_memory, dense_cache_mode
from qratk.core.errors import ConfigurationError

SIZE = 400  # bytes of a weight here


def cache_of(weights, mode="auto"):
    """Cache whose allowance is this many weights."""
    cache = DenseCache(mode, available=lambda device: 4 * SIZE * weights - cache.used)
    return cache


def ask(cache, *tokens):
    """Number of weights that had to be made for these tokens."""
    made = []

    def make():
        made.append(1)
        return torch.zeros(SIZE // 4)

    for token in tokens:
        cache.get((token, 4, torch.float32), make, owned=lambda dense: True)
    return len(made)


def test_yaml_booleans_are_modes():
    assert [dense_cache_mode(value) for value in (True, False, "on", "off", "auto")] == [
        "on",
        "off",
        "on",
        "off",
        "auto",
    ]
    with pytest.raises(ConfigurationError, match="'always'"):
        dense_cache_mode("always")


def test_auto_keeps_no_more_than_its_allowance():
    cache = cache_of(2)
    assert ask(cache, "a", "b", "c") == 3
    assert (len(cache), cache.used) == (2, 2 * SIZE)
    assert ask(cache, "a", "b", "c") == 1  # a pass over all layers finds what the last one kept


def test_on_keeps_what_is_in_use_whatever_the_allowance():
    cache = cache_of(1, "on")
    ask(cache, "a", "b", "c")
    assert ask(cache, "a", "b", "c") == 0


def test_off_keeps_nothing():
    cache = cache_of(9, "off")
    assert ask(cache, "a", "a") == 2
    assert cache.used == 0


@pytest.mark.parametrize("mode", ["on", "auto"])
def test_after_a_switch_the_longest_unused_makes_room(mode):
    cache = cache_of(3, mode)
    ask(cache, "a", "b", "c", "a")
    cache.next_generation()
    assert ask(cache, "d") == 1
    assert ask(cache, "a", "c") == 0
    assert ask(cache, "b") == 1
    assert cache.used <= 4 * SIZE


def test_less_memory_at_a_switch_shrinks_the_cache():
    left = [100 * SIZE]
    cache = DenseCache("auto", available=lambda device: left[0])
    ask(cache, *"abcdefgh")
    left[0] = 0
    cache.next_generation()
    ask(cache, "a")
    assert cache.used <= 3 * SIZE  # a quarter of the eight that it held itself, and what is in use


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_running_out_of_memory_empties_the_cache_and_tries_again(error):
    cache = cache_of(9)
    ask(cache, "a", "b")
    tries = []

    def make():
        tries.append(len(cache))
        if len(cache):
            raise error
        return torch.zeros(SIZE // 4)

    cache.get(("c", 4, torch.float32), make, owned=lambda dense: True)
    assert tries == [2, 0]
    assert ask(cache, "a", "a") == 2  # nothing is kept until the next switch
    cache.next_generation()
    assert ask(cache, "a", "a") == 1


def test_a_weight_that_shows_stored_bytes_is_not_kept():
    cache = cache_of(9, "on")
    cache.get(("a", 16, torch.float32), lambda: torch.zeros(1), owned=lambda dense: False)
    assert len(cache) == 0


def test_dropping_a_projection_leaves_the_others():
    cache = cache_of(9)
    a, b = object(), object()
    ask(cache, a, b)
    cache.drop(a, 2)
    assert len(cache) == 2
    cache.drop(a, 4)
    assert ask(cache, b) == 0
    assert cache.used == SIZE


def test_a_copy_begins_empty():
    cache = cache_of(9)
    ask(cache, "a")
    other = copy.deepcopy(cache)
    assert (other.mode, len(other), len(cache)) == ("auto", 0, 1)


def test_a_weight_made_in_inference_mode_serves_training_later():
    cache, made = cache_of(9), []
    with torch.inference_mode():
        made.append(cache.get(("a", 4, torch.float32), lambda: torch.ones(3), owned=lambda dense: True))
    x = torch.ones(3, requires_grad=True)
    (x * made[0]).sum().backward()
    assert torch.equal(x.grad, torch.ones(3))


def test_available_memory_is_something():
    assert 0 < available_memory(torch.device("cpu")) < 2**60
