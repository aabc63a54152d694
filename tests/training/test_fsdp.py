"""Fits on two processes, with adapters replicated or sharded, against one process with the same batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from safetensors.torch import load_file
from tiny_runs import Files, adapters_of, fitted, make_module, opened

from qratk.core.errors import ConfigurationError
from qratk.training.sharding import NAME, require_strategy

HARD = {"configuration": "4:0 4:1 2:3", "gradient_checkpointing": True, "rslora": True, "schedule_steps": 4}
SCRIPT = """
import json, sys
import torch
from safetensors.torch import save_file
from qratk.adapters.matrices.shards import local
from tiny_runs import Files, adapters_of, fitted, make_module
torch.set_num_threads(1)
given = json.loads(sys.argv[1])
files = Files(given["model"], given["data"])
module = make_module(files, **given["module"])
module, losses, score = fitted(files, module=module, batch_size=2, devices=2, **given["trainer"])
rank = torch.distributed.get_rank()
state = adapters_of(module)
held = sum(local(parameter).numel() for _, parameter in module.backbone.trainable_parameters())
if rank == 0:
    module.save_adapter(given["out"] + "/adapter")  # by one process alone, as the command line does
    save_file(state, given["out"] + "/state.safetensors")
with open(f"{given['out']}/{rank}.json", "w") as file:
    json.dump({"losses": losses, "score": score, "held": held}, file)
"""


@pytest.fixture(scope="module")
def files(model_dir: Path, data_files: dict[str, str]) -> Files:
    return Files(str(model_dir), data_files)


def on_two(files: Files, out: Path, module: dict[str, Any], **trainer: Any) -> tuple[dict[str, Any], ...]:
    """What each process of a fit tells: losses, score and how many adapter weights it holds."""
    out.mkdir()
    script = out / "fit.py"  # Lightning starts the second process by the file that the first one runs
    script.write_text(SCRIPT)
    given = {"model": files.model, "data": files.data, "out": str(out), "module": module, "trainer": trainer}
    paths = [str(Path(__file__).parent), *sys.path]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), json.dumps(given)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in paths if path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return tuple(json.loads((out / f"{rank}.json").read_text()) for rank in range(2))


def on_one(files: Files, module: dict[str, Any], **trainer: Any) -> Any:
    """The same batches on one process."""
    return fitted(files, module=make_module(files, **module), batch_size=2, accumulate_grad_batches=2, **trainer)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", NAME])
@pytest.mark.parametrize(
    ("module", "trainer", "tolerance"),
    [
        ({}, {}, 1e-4),
        (HARD, {"gradient_clip_val": 0.5}, 1e-4),
        ({**HARD, "compute_dtype": "bfloat16"}, {"gradient_clip_val": 0.5}, 3e-2),
        ({}, {"precision": "bf16-mixed"}, 3e-2),
    ],
)
def test_two_processes_train_what_one_does(
    files: Files, tmp_path: Path, strategy: str, module: dict[str, Any], trainer: dict[str, Any], tolerance: float
) -> None:
    told = on_two(files, tmp_path / "two", module, strategy=strategy, **trainer)
    alone, losses, score = on_one(files, module, **trainer)
    # Lightning divides the loss of an accumulated micro-batch; the two processes take micro-batches in turn.
    taken = [told[index % 2]["losses"][index // 2] for index in range(len(losses))]
    assert taken == pytest.approx([2 * loss for loss in losses], rel=tolerance)
    assert [one["score"] for one in told] == pytest.approx([score] * 2, rel=tolerance)
    expected, found = adapters_of(alone), load_file(tmp_path / "two" / "state.safetensors")
    assert found.keys() == expected.keys()
    assert all(found[name].shape == expected[name].shape for name in expected)
    if tolerance < 1e-3:
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-2, atol=1e-4)
    saved = load_file(tmp_path / "two" / "adapter" / "adapter_model.safetensors")
    assert saved.keys() == {f"base_model.model.{name}" for name in found}
    assert all(torch.equal(saved[f"base_model.model.{name}"], value.bfloat16()) for name, value in found.items())
    weights = sum(value.numel() for value in expected.values())
    held = [one["held"] for one in told]
    assert sum(held) == weights if strategy == NAME else held == [weights, weights]


@pytest.mark.slow
def test_checkpoints_of_one_device_and_of_shards_continue_each_other(files: Files, tmp_path: Path) -> None:
    whole = on_one(files, HARD, steps=4, keep=tmp_path / "one")
    on_two(files, tmp_path / "two", HARD, strategy=NAME, steps=2, keep=str(tmp_path / "shards"))
    (kept,) = (tmp_path / "shards").glob("*.ckpt")
    assert kept.is_file()
    continued = on_one(files, HARD, steps=4, resume=str(kept), keep=tmp_path / "shards")
    (half,) = (tmp_path / "one").glob("*step=2.ckpt")
    told = on_two(files, tmp_path / "again", HARD, strategy=NAME, steps=4, resume=str(half), keep=str(tmp_path / "one"))
    assert continued[1] == pytest.approx(whole[1][4:], rel=1e-4)
    assert [2 * loss for loss in whole[1][4::2]] == pytest.approx(told[0]["losses"], rel=1e-4)
    found = load_file(tmp_path / "again" / "state.safetensors")
    for name, value in adapters_of(whole[0]).items():
        torch.testing.assert_close(adapters_of(continued[0])[name], value, rtol=1e-2, atol=1e-4)
        torch.testing.assert_close(found[name], value, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy])
def test_strategies_that_shard_the_frozen_model_are_refused(strategy: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"--trainer.strategy={NAME}"):
        require_strategy(strategy())


def test_search_with_sharded_adapters_is_refused(files: Files, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="shard the fit of what it found"):
        opened(tmp_path, files, {"strategy": NAME, "accelerator": "cpu", "devices": 1})
