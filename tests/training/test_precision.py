"""Training and scoring in 16 bits: activations may be, the adapters' masters never are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import MIXED, Files, evaluated, fitted, make_module, opened

from qratk.core.errors import ConfigurationError

OTHER = "4:4 2:2 8:4"
IN_16_BITS = ({"compute_dtype": "bfloat16"}, {"precision": "bf16-mixed"})


@pytest.fixture(scope="module")
def files(model_dir: Path, data_files: dict[str, str]) -> Files:
    return Files(str(model_dir), data_files)


def split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the module, and of the trainer."""
    own = {key: value for key, value in options.items() if key == "compute_dtype"}
    return own, {key: value for key, value in options.items() if key not in own}


@pytest.mark.parametrize("options", IN_16_BITS)
@pytest.mark.parametrize("clip", [None, 0.1])
def test_fit_in_16_bits_trains_masters_in_float32(files: Files, options: dict[str, Any], clip: float | None) -> None:
    own, trainer = split(options)
    expected = fitted(files, steps=6, gradient_clip_val=clip)
    module, losses, score = fitted(files, steps=6, gradient_clip_val=clip, module=make_module(files, **own), **trainer)
    assert losses != expected[1]
    assert losses == pytest.approx(expected[1], rel=3e-2)
    assert score == pytest.approx(expected[2], rel=3e-2)
    parameters = dict(module.backbone.trainable_parameters())
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    assert any(not torch.equal(p, p.bfloat16().float()) for p in parameters.values())


@pytest.mark.parametrize("options", IN_16_BITS)
def test_clipping_in_16_bits_bounds_what_the_optimiser_sees(files: Files, options: dict[str, Any]) -> None:
    own, trainer = split(options)
    module = make_module(files, **own)
    norms = []

    def remember(optimizer: Any) -> None:
        grads = [p.grad for _, p in module.backbone.trainable_parameters() if p.grad is not None]
        if grads:
            norms.append(float(torch.nn.utils.get_total_norm(grads)))

    module.on_before_zero_grad = remember  # type: ignore[method-assign]
    fitted(files, module=module, gradient_clip_val=1e-3, **trainer)
    # Gradients are zeroed before each forward pass: those seen are of the step before, clipped.
    assert norms == pytest.approx([1e-3] * 3, rel=1e-3)


@pytest.mark.parametrize("options", IN_16_BITS)
def test_cohort_in_16_bits_scores_as_each_candidate_alone(
    files: Files, options: dict[str, Any], tmp_path: Path
) -> None:
    own, trainer = split(options)
    trainer["accelerator"] = "cpu"
    alone = evaluated(opened(tmp_path / "alone", files, trainer, **own), 4, MIXED, OTHER)
    together = evaluated(opened(tmp_path / "together", files, trainer, cohort=2, **own), 4, MIXED, OTHER)
    assert [e.status for e in together] == ["ok", "ok"]
    assert [e.score for e in together] == pytest.approx([e.score for e in alone], rel=2e-2)


@pytest.mark.parametrize("options", IN_16_BITS)
def test_rung_in_16_bits_continues_to_the_bit(files: Files, options: dict[str, Any], tmp_path: Path) -> None:
    own, trainer = split({**options, "accelerator": "cpu"})
    whole = evaluated(opened(tmp_path / "whole", files, trainer, lora_dropout=0.2, **own), 6)[0]
    rungs = opened(tmp_path / "rungs", files, trainer, lora_dropout=0.2, **own)
    assert [evaluated(rungs, steps)[0] for steps in (2, 4, 6)][-1].score == whole.score


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_precision_that_would_cast_the_masters_is_refused(files: Files, precision: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"--model\.compute_dtype"):
        fitted(files, precision=precision)
    with pytest.raises(ConfigurationError, match=r"--model\.compute_dtype"):
        opened(tmp_path, files, {"precision": precision, "accelerator": "cpu"})
