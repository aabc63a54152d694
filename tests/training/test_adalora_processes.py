"""AdaLoRA on two processes: both prune the same directions as one process does, and shards are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_fsdp import on_one, on_two
from tiny_runs import Files, adapters_of, fitted, make_module

from qratk.core.errors import ConfigurationError
from qratk.training.sharding import NAME

ADALORA = {"adapter": "adalora", "adalora": {"delta_t": 1, "tinit": 0.3, "tfinal": 0.3}, "schedule_steps": 4}


@pytest.fixture(scope="module")
def files(model_dir: Path, data_files: dict[str, str]) -> Files:
    return Files(str(model_dir), data_files)


@pytest.mark.slow
def test_two_processes_keep_the_directions_that_one_does(files: Files, tmp_path: Path) -> None:
    told = on_two(files, tmp_path / "two", ADALORA, strategy="ddp")
    alone, _, score = on_one(files, ADALORA)
    assert [one["score"] for one in told] == pytest.approx([score] * 2, rel=1e-4)
    expected, found = adapters_of(alone), load_file(tmp_path / "two" / "state.safetensors")
    assert found.keys() == expected.keys()
    kept = [name for name in expected if name.endswith(".kept")]
    assert kept
    assert all(torch.equal(found[name], expected[name]) for name in kept)
    assert not all(expected[name].all() for name in kept)


def test_sharded_adapters_are_refused(files: Files) -> None:
    with pytest.raises(ConfigurationError, match="whole adapters"):
        fitted(files, module=make_module(files, **ADALORA), strategy=NAME)
