"""DoRA against PEFT: the same gradients, and training within a search as within a fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_runs import MIXED, evaluated, opened, score_of_fit

from qratk.adapters.dora import Dora
from qratk.adapters.options import AdapterOptions
from qratk.core import Configuration, ConfigurationError


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_gradients_are_those_of_pefts_own(
    family: str, tiny_model: Callable[..., Any], tiny_backbone: Callable[..., Any], tiny_batch: dict[str, Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    from peft import PeftModel

    configuration = Configuration.uniform(16, 4, 3)
    backbone = tiny_backbone(family, method=Dora())
    backbone.activate(configuration, seed=1)
    generator = torch.Generator().manual_seed(2)
    state = {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in backbone.adapter_state().items()}
    backbone.load_adapter_state({name: value.bfloat16().float() for name, value in state.items()})
    backbone.save_adapter(tmp_path, configuration)
    plain = PeftModel.from_pretrained(tiny_model(family), str(tmp_path), is_trainable=True)
    for model in (backbone.model, plain):
        model.train(False)
        model(**tiny_batch, labels=tiny_batch["input_ids"]).loss.backward()
    theirs = {name.replace(".default", ""): p.grad for name, p in plain.named_parameters() if p.requires_grad}
    for name, parameter in backbone.trainable_parameters():
        torch.testing.assert_close(parameter.grad, theirs[f"base_model.model.{name}"], rtol=1e-3, atol=1e-5)
    assert len(theirs) == len(backbone.trainable_parameters())


def test_a_fit_has_the_score_of_the_search_which_continues_to_the_bit(
    tmp_path: Path, model_dir: Path, data_files: dict[str, str]
) -> None:
    straight = opened(tmp_path / "straight", model_dir, data_files, adapter="dora", cohort=4)
    whole = evaluated(straight, MIXED, 6)
    climbing = opened(tmp_path / "climbing", model_dir, data_files, adapter="dora")
    evaluated(climbing, MIXED, 2)
    evaluated(climbing, Configuration.uniform(4, 4, 3), 2)  # another candidate in between
    assert evaluated(climbing, MIXED, 6).outcomes == whole.outcomes
    score, _ = score_of_fit(model_dir, data_files, adapter={"class_path": "dora"})
    assert score == pytest.approx(whole.score, abs=0)


def test_pooled_inputs_are_refused(tiny_backbone: Callable[..., Any]) -> None:
    with pytest.raises(ConfigurationError, match="norms over all inputs"):
        tiny_backbone(method=Dora(), adapter=AdapterOptions(input_groups=8))
