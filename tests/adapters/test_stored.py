"""Adapters that are stored in 8 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qratk.adapters.adalora import AdaLora
from qratk.adapters.base import AdapterMethod, stored_bytes
from qratk.adapters.cut import Cut
from qratk.adapters.dora import Dora
from qratk.adapters.lora import Lora
from qratk.adapters.matrices.stored import stored_parts, stored_values
from qratk.adapters.options import AdapterOptions
from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError
from qratk.testing._torch_adapters import adapted, logits, tiny_llama, trained
from qratk.training.cohort import Cohort

METHODS = [Lora(), Dora(), Cut(width=8, metric="plain"), Cut(width=8, metric="plain", allocation="model")]
MIXED = Configuration.of([4, 4, 16], [4, 2, 8])


@pytest.mark.parametrize("name", ["q.lora_A.weight", "q.lora_B.weight"])
def test_values_are_within_half_a_step_and_stay_when_they_are_stored_again(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-30, 1e-6, 1.0, 37.0):
        value = scale * torch.randn(2, 6, 500, generator=generator) * torch.rand(2, 6, 500, generator=generator) ** 3
        value = value if "lora_A" in name else value.transpose(-1, -2)
        value[1].select(-2 if "lora_A" in name else -1, 5).zero_()  # a direction that a candidate has not
        once = stored_values(name, value, "int8")
        most = value.abs().amax(-1 if "lora_A" in name else -2, keepdim=True)
        assert bool(((once.float() - value).abs() <= most / 127).all())
        assert torch.equal(stored_values(name, once.float(), "int8"), once)
        assert torch.equal(once[1], stored_values(name, value[1], "int8"))


def test_what_is_not_finite_stays_so() -> None:
    value = torch.ones(3, 4)
    value[1, 2], value[2, 0] = torch.nan, torch.inf
    assert stored_values("q.lora_A.weight", value, "int8").isnan().any(1).tolist() == [False, True, True]


def test_other_parameters_and_types_have_16_bits() -> None:
    value = torch.randn(5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(stored_values("q.lora_magnitude_vector.weight", value, "int8"), value.bfloat16())
    assert {n: t.dtype for n, t in stored_parts("q.lora_A.weight", value, "float16").items()} == {
        "q.lora_A.weight": torch.float16
    }


@pytest.mark.parametrize("method", METHODS, ids=["lora", "dora", "cut", "cut of the model"])
def test_bytes_are_exact_and_peft_has_the_values_that_are_scored(method: AdapterMethod, tmp_path: Path) -> None:
    from peft import PeftModel

    configuration = Configuration.of([16, 16, 16], [4, 2, 8])
    backbone = adapted(method, configuration, dtype="int8")
    trained(backbone)
    stored, options = backbone.adapters.stored_tensors(), backbone.adapters.options
    foretold = sum(
        stored_bytes(method, options, [bank.shape for _, bank in layer.modules], choice.rank)
        for layer, choice in zip(backbone.layers, configuration.layers, strict=True)
    )
    found = sum(tensor.nbytes for tensor in stored.values())
    assert found == foretold or (isinstance(method, Cut) and 0.95 * foretold < found < foretold)
    assert {tensor.dtype for name, tensor in stored.items() if name.endswith("_A.weight")} == {torch.int8}
    assert foretold < 0.62 * stored_bytes(method, AdapterOptions(), [bank.shape for bank in backbone.banks.values()], 5)
    backbone.save_adapter(tmp_path, configuration)
    plain: Any = PeftModel.from_pretrained(tiny_llama(), str(tmp_path)).eval()
    backbone.model.eval()
    with backbone.stored_precision():
        torch.testing.assert_close(logits(plain), logits(backbone.model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", [Lora(), Cut(width=8, metric="plain")], ids=["lora", "cut"])
def test_side_by_side_the_stored_values_are_those_of_one_alone(method: AdapterMethod) -> None:
    backbone = adapted(method, MIXED, dtype="int8")
    other = Configuration.of([4, 16, 4], [8, 4, 2])
    cohort = Cohort.of(backbone, [other, MIXED], seed=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in cohort.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator) * (parameter != 0)
    backbone.load_adapter_state(cohort.state(1))
    with cohort.stored_precision():
        beside = cohort.state(1)
    with backbone.stored_precision():
        alone = {name: parameter.detach().clone() for name, parameter in backbone.trainable_parameters()}
    assert alone.keys() <= beside.keys()
    for name, value in alone.items():
        assert torch.equal(value, beside[name][tuple(slice(size) for size in value.shape)])


def test_what_moves_directions_while_it_trains_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="adapter_dtype=bfloat16"):
        adapted(AdaLora(), MIXED, dtype="int8")
