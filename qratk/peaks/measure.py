"""Peak of real training, measured: by the allocator's events on the CPU, by its peak counter on CUDA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qratk.backbone.backbone import Backbone
from qratk.core.configuration import Configuration
from qratk.peaks.trace import resident_tensors, training_batch, training_step


def resident_bytes(backbone: Backbone) -> int:
    """Bytes of the distinct storages that a backbone holds."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for _, t in resident_tensors(backbone)}
    return sum(storages.values())


def allocated_peak(action: Callable[[], Any], device: torch.device) -> int:
    """Most bytes that were allocated at once during an action, over what there was before.

    On the CPU every event of torch's allocator is followed, temporaries inside kernels included; what libraries take
    from the system by themselves is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        action()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    events: Any = profiler.profiler.kineto_results.events()
    changes = sorted(
        (event.start_ns(), i, event.nbytes()) for i, event in enumerate(events) if event.name() == "[memory]"
    )
    live = peak = 0
    for _, _, change in changes:
        live += change
        peak = max(peak, live)
    return peak


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
