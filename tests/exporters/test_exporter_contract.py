"""Every registered exporter keeps the contract, and what it writes is what was trained."""

from __future__ import annotations

import pytest
import torch

from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError
from qratk.exporters.base import exporters
from qratk.exporters.native import native_model
from qratk.exporters.packed import load_quantized
from qratk.quantizers.base import quantizers
from qratk.testing import ExporterContract, tiny_batches


class TestDense(ExporterContract):
    @pytest.fixture
    def make(self):
        return lambda: exporters.create("dense", dtype="float32")

    def test_transformers_reads_the_merged_model_with_the_same_logits(self, make, backbone, tmp_path):
        from transformers import AutoModelForCausalLM

        make().export(backbone, tmp_path / "out")
        ids = tiny_batches(1)[0]["input_ids"]
        with torch.no_grad(), backbone.stored_precision():
            ours = backbone.model(input_ids=ids).logits
            theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(input_ids=ids).logits
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


class TestPacked(ExporterContract):
    @pytest.fixture
    def make(self):
        return lambda: exporters.create("packed")

    def test_comes_back_with_the_same_logits_to_the_bit(self, make, backbone, tmp_path):
        from peft import PeftModel

        make().export(backbone, tmp_path / "out")
        base = native_model(load_quantized(tmp_path / "out"), backbone.configuration)
        ids = tiny_batches(1)[0]["input_ids"]
        again = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
        with torch.no_grad(), backbone.stored_precision():
            assert torch.equal(again(input_ids=ids).logits, backbone.model(input_ids=ids).logits)

    @pytest.mark.parametrize("name", ["quantized.safetensors", "fixed.safetensors", "quantized.json", "config.json"])
    def test_flipped_bit_is_told_with_its_file_when_it_comes_back(self, make, backbone, tmp_path, name):
        make().export(backbone, tmp_path / "out")
        content = bytearray((tmp_path / "out" / name).read_bytes())
        content[-9] ^= 2
        (tmp_path / "out" / name).write_bytes(content)
        with pytest.raises(ConfigurationError, match=f"{name} is damaged"):
            load_quantized(tmp_path / "out")

    def test_folder_of_before_digests_comes_back(self, make, backbone, tmp_path):
        make().export(backbone, tmp_path / "out")
        (tmp_path / "out" / "SHA256SUMS").unlink()
        assert load_quantized(tmp_path / "out").digest() == backbone.digest()


class TestPeft(ExporterContract):
    @pytest.fixture
    def make(self):
        return lambda: exporters.create("peft")

    def test_refuses_a_configuration_without_adapters(self, make, backbone, tmp_path):
        backbone.activate(Configuration.uniform(4, 0, 3), seed=0)
        with pytest.raises(ConfigurationError, match="no adapter"):
            make().export(backbone, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []


class TestCompressedTensors(ExporterContract):
    @pytest.fixture
    def make(self):
        return lambda: exporters.create("compressed-tensors")

    @pytest.fixture
    def four_bits(self):
        return quantizers.create("affine", group_size=32)


class TestBitsandbytes(ExporterContract):
    @pytest.fixture
    def make(self):
        return lambda: exporters.create("bitsandbytes")


class TestGptq(ExporterContract):
    @pytest.fixture
    def make(self):
        return lambda: exporters.create("gptq")

    @pytest.fixture
    def four_bits(self):
        return quantizers.create("affine", group_size=32)


class TestMlx(ExporterContract):
    @pytest.fixture
    def make(self):
        return lambda: exporters.create("mlx")

    @pytest.fixture
    def four_bits(self):
        return quantizers.create("affine", group_size=32)


class TestRecipe(ExporterContract):
    @pytest.fixture
    def make(self):
        return lambda: exporters.create("recipe")


class TestGguf(ExporterContract):
    @pytest.fixture
    def make(self):
        return lambda: exporters.create("gguf")

    @pytest.fixture
    def four_bits(self):
        return quantizers.create("affine", group_size=32)


def test_every_exporter_is_under_contract():
    assert set(exporters.names()) == {
        "bitsandbytes", "compressed-tensors", "dense", "gguf", "gptq", "mlx", "packed", "peft", "recipe",
    }  # fmt: skip
