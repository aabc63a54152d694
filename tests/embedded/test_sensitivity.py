"""How the embedded model's layers were found to differ."""

from __future__ import annotations

import pytest
import torch

from qratk.embedded.sensitivity import fake_quantise


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize(("bits", "bound"), [(16, 0.0), (8, 0.01), (4, 0.12), (2, 0.6)])
def test_weights_of_the_embedded_models_shapes_read_back_near_what_they_were(bits: int, bound: float) -> None:
    for rows, columns in ((96, 96), (192, 96), (96, 192)):
        weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
        assert float((fake_quantise(weight, bits) - weight).norm() / weight.norm()) <= bound
