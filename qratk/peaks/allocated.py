"""Most bytes that an action takes from torch's allocators."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

_NOTES_OF_KINETO = "6"  # above all levels: some builds of torch note on stderr that a profile begins and ends


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

    os.environ.setdefault("KINETO_LOG_LEVEL", _NOTES_OF_KINETO)  # read when the first profile begins
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
