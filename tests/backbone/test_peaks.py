"""Estimated peaks against what autograd really keeps."""

from __future__ import annotations

import pytest
import torch

from qratk.core.configuration import Configuration
from qratk.core.space import SearchSpace


def saved_bytes(backbone, batch):
    """Bytes of the distinct tensors that autograd keeps for a backward pass, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in backbone.model.parameters()}
    storages: dict[int, tuple[torch.UntypedStorage, int]] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = (storage, storage.nbytes())  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        backbone.model(**batch, labels=batch["input_ids"], use_cache=False)
    return sum(size for _, size in storages.values())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox", "gpt2"])
def test_training_estimate_covers_what_autograd_keeps_and_not_far_more(family, tiny_backbone):
    backbone = tiny_backbone(family, bits=(4,))
    configuration = Configuration.uniform(4, 4, 3)
    backbone.activate(configuration, seed=0)
    backbone.model.train()
    ids = torch.randint(3, 96, (4, 48), generator=torch.Generator().manual_seed(0))
    kept = saved_bytes(backbone, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    space = SearchSpace((4,), (4,), tuple(shape.name for shape in backbone.shapes))
    footprint = backbone.memory_model(space, batch_size=4, sequence_length=48).footprint(configuration)
    adapters = 8 * footprint.adapters  # 16 bytes a weight, and 2 of them are what is stored
    estimate = footprint.training_bytes - footprint.weights - footprint.metadata - footprint.fixed - adapters
    assert kept < estimate < 2.5 * kept, (kept, estimate, estimate / kept)
