"""States on disk: written by any number of processes, and never used when damaged."""

from __future__ import annotations

import json
import multiprocessing
import random
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from qratk.training.checkpoints import continues, discard_state, load_state, save_state
from qratk.training.state import TrainingState


def state(seed: int = 0) -> TrainingState:
    rng = torch.Generator().manual_seed(seed)
    adapter = {f"layer.{n}": torch.randn(8, 16, generator=rng) for n in range(3)}
    moments = {f"layer.{n}.moment": torch.randn(8, 16, generator=rng) for n in range(3)}
    return TrainingState(7, adapter, moments, torch.get_rng_state())


def equal(a: TrainingState, b: TrainingState) -> bool:
    pairs = ((a.adapter, b.adapter), (a.optimizer, b.optimizer))
    return a.steps == b.steps and all(
        left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
        for left, right in pairs
    )


def save_many(folder: Path, times: int) -> None:
    for number in range(times):
        save_state(folder / str(number), state(), optimizer=True)


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    save_state(tmp_path / "run" / "7", state(), optimizer=True)
    assert equal(load_state(tmp_path / "run" / "7"), state())
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["7"]


def test_without_the_optimizer_no_training_continues(tmp_path: Path) -> None:
    save_state(tmp_path / "7", state(), optimizer=False)
    assert not continues(tmp_path / "7")
    assert load_state(tmp_path / "7").optimizer == {}


def test_two_writers_of_one_state_do_not_break_each_other(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=save_many, args=(tmp_path, 60)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(map(str, range(60)))
    assert all(equal(load_state(path), state()) for path in tmp_path.iterdir())


def test_a_whole_state_stays_and_a_damaged_one_gives_way(tmp_path: Path) -> None:
    path = tmp_path / "7"
    save_state(path, state(1), optimizer=True)
    save_state(path, state(2), optimizer=True)
    assert equal(load_state(path), state(1))
    (path / "adapter.safetensors").write_bytes(b"cut off")
    save_state(path, state(2), optimizer=True)
    assert equal(load_state(path), state(2))


def test_a_state_with_the_optimizer_replaces_one_without(tmp_path: Path) -> None:
    save_state(tmp_path / "7", state(), optimizer=False)
    save_state(tmp_path / "7", state(), optimizer=True)
    assert continues(tmp_path / "7")


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "state.json"])
def test_any_flipped_bit_is_found(tmp_path: Path, name: str) -> None:
    rng = random.Random(name)
    path = tmp_path / "7"
    save_state(path, state(), optimizer=True)
    whole = (path / name).read_bytes()
    for _ in range(40):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        (path / name).write_bytes(damaged)
        with pytest.raises((OSError, ValueError, SafetensorError)):
            load_state(path)


def test_a_state_from_before_digests_is_read(tmp_path: Path) -> None:
    path = tmp_path / "7"
    path.mkdir()
    save_file(state().adapter, path / "adapter.safetensors")
    save_file({**state().optimizer, "random": state().random}, path / "optimizer.safetensors")
    (path / "state.json").write_text(json.dumps({"steps": 7}))
    assert equal(load_state(path), state())


def test_nothing_is_left_of_a_discarded_state_nor_of_a_killed_writer(tmp_path: Path) -> None:
    path = tmp_path / "run" / "7"
    save_state(path, state(), optimizer=True)
    (tmp_path / "run" / f"7.{2**22 + 1}-abc.part").mkdir()  # beyond the largest process
    (tmp_path / "run" / "7.part").mkdir()
    discard_state(path)
    assert not path.parent.exists()
    discard_state(path)
