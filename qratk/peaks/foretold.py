"""The memory model of a backbone over a space: exact bytes, and peaks that are traced or estimated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qratk.backbone.backbone import Backbone
from qratk.backbone.layers import find_blocks
from qratk.core.memory import MemoryModel, require_ranks
from qratk.core.space import SearchSpace
from qratk.core.work import working
from qratk.peaks.estimate import ModelFacts, bytes_and_estimates
from qratk.peaks.trace import Device
from qratk.peaks.uniform import training_peaks


def memory_model(
    backbone: Backbone,
    space: SearchSpace,
    *,
    batch_size: int = 1,
    sequence_length: int = 512,
    gradient_checkpointing: bool = False,
    dense_cache: bool | None = None,
    device: Device | None = None,
    trace: bool = True,
) -> MemoryModel:
    """Exact bytes of any configuration of the space, and peaks for this batch and length.

    Training peaks are traced on the meta device, as on `device` (by default where the weights lie or training would
    go); of a model that cannot be traced, and without `trace`, they are estimates. With `dense_cache`, by default when
    the backbone's mode is "on", the dense weights of the configuration are counted. Serving peaks are estimates. Of
    shared settings, dropout alone takes memory in training: where it may be had, it is counted for all.
    """
    require_ranks(backbone.shapes, space.ranks)
    if dropouts := [float(v) for ladder in space.shared if ladder.name == "lora_dropout" for v in ladder.values]:
        backbone.adapters.configure(replace(backbone.adapters.options, dropout=max(dropouts)))
    dense = backbone.keeps_dense if dense_cache is None else dense_cache
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "sequence_length": sequence_length,
        "gradient_checkpointing": gradient_checkpointing,
    }
    facts = facts_of(backbone)
    with working("tracing peak memory"):
        training = training_peaks(backbone, space, **options, dense_cache=dense, device=device) if trace else None
    memory = bytes_and_estimates(
        space,
        backbone.shapes,
        backbone.table,
        facts,
        adapter_bytes=backbone.adapter_bytes,
        number_bytes=backbone.adapters.options.number_bytes,
        training=training,
        **options,
    )
    return backbone.adapters.method.training_memory(memory)


def facts_of(backbone: Backbone) -> ModelFacts:
    """What besides its layers decides the peaks of a backbone's model."""
    return ModelFacts.of(
        backbone.config,
        num_blocks=len(find_blocks(backbone.base)[1]),
        item_size=backbone.compute_dtype.itemsize,
        fixed_bytes=sum(tensor.nbytes for tensor in backbone.fixed_tensors().values()),
    )
