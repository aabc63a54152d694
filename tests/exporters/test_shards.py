"""Files of weights that are written one after another."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError
from qratk.exporters._shards import read_shards, write_shards
from qratk.exporters.dense import dense_tensors, merged_model


def test_transformers_reads_several_files_as_one(tiny_backbone, tmp_path):
    backbone = tiny_backbone(bits=(4,))
    backbone.activate(Configuration.uniform(4, 0, 3), seed=0)
    write_shards(dense_tensors(backbone, torch.float32), tmp_path, limit=60_000)
    backbone.config.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    expected, found = merged_model(backbone), AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in expected.state_dict().items())
    again = read_shards(tmp_path)
    assert all(torch.equal(read(), expected.state_dict()[name]) for name, read in again.items())


def test_folder_without_weights_is_told(tmp_path):
    with pytest.raises(ConfigurationError, match="holds no weights"):
        read_shards(tmp_path)
