"""Peak of real training, measured: by the allocator's events on the CPU, by its peak counter on CUDA."""

from __future__ import annotations

import torch

from qratk.backbone.backbone import Backbone
from qratk.core.configuration import Configuration
from qratk.peaks.allocated import allocated_peak
from qratk.peaks.trace import resident_tensors, training_batch, training_step


def resident_bytes(backbone: Backbone) -> int:
    """Bytes of the distinct storages that a backbone holds."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for _, t in resident_tensors(backbone)}
    return sum(storages.values())


def measured_peak(
    backbone: Backbone,
    configuration: Configuration,
    *,
    batch_size: int,
    sequence_length: int,
    gradient_checkpointing: bool = False,
    dense_cache: bool = False,
    steps: int = 2,
) -> int:
    """Peak bytes of `steps` real training steps of a configuration, its weights included; the backbone is used up.

    The bank is built, all but the configuration's own variants are dropped, as for fine-tuning one configuration.
    """
    backbone.build_bank(sorted(set(configuration.bits)))
    backbone.activate(configuration, seed=0)
    backbone.keep_active()
    backbone.dense_cache("on" if dense_cache else "off")
    if gradient_checkpointing:
        backbone.enable_gradient_checkpointing()
    backbone.model.train()
    device = next(iter(backbone.banks.values())).device

    def action() -> None:
        parameters = [p for _, p in backbone.trainable_parameters() if p.numel()]
        optimizer = torch.optim.AdamW(parameters, fused=True)
        batch = training_batch(batch_size, sequence_length, device)
        for _ in range(steps):  # from the second on the optimiser has its moments
            training_step(backbone.model, optimizer, batch)

    return resident_bytes(backbone) + allocated_peak(action, device)
