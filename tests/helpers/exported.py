"""What the tests of exporters export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qratk.backbone.backbone import Backbone
from qratk.core.configuration import Configuration

MIXED = Configuration.of([2, 3, 4, 8, 16], [2, 4, 0, 8, 3])


def mixed_backbone(
    tiny_backbone: Callable[..., Backbone],
    family: str = "llama",
    *,
    configuration: Configuration = MIXED,
    **options: Any,
) -> Backbone:
    """Backbone at mixed bits and ranks with adapters that do something."""
    backbone = tiny_backbone(family, **{"bits": (2, 3, 4, 8, 16), "layers": 5, **options})
    backbone.activate(configuration, seed=3)
    generator = torch.Generator().manual_seed(0)
    state = {n: 0.2 * torch.randn(t.shape, generator=generator) for n, t in backbone.adapter_state().items()}
    backbone.load_adapter_state(state)
    return backbone
