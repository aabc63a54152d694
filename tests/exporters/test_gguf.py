"""GGUF: the very codes in types of llama.cpp, in its order of rows, and read back by another reader."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from exported import mixed_backbone

from qratk.adapters.base import adapters
from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError, QuantizationError, UnsupportedModelError
from qratk.exporters import _gguf_blocks as blocks
from qratk.exporters._gguf_architecture import architecture_of, permuted, restored, rope_factors
from qratk.exporters._gguf_file import Entry, read_gguf, write_gguf
from qratk.exporters._gguf_reader import read_model
from qratk.exporters._gguf_tokenizer import tokenizer_metadata
from qratk.exporters.base import EXACT
from qratk.exporters.gguf import GgufExporter
from qratk.exporters.selfcheck import self_check
from qratk.quantizers.base import quantizers


def table(**options):
    return {
        bits: quantizers.create("affine", **{"group_size": 32, "symmetric": bits == 8, **options})
        for bits in (2, 3, 4, 8)
    }


def mixed(tiny_backbone, family="llama", **options):
    return mixed_backbone(tiny_backbone, family, **{"quantizers": table(), **options})


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma"])
def test_weights_are_those_of_the_bank_to_the_bit_but_for_lowest_values_at_4_bits(family, tiny_backbone, tmp_path):
    backbone = mixed(tiny_backbone, family)
    for exact in (True, False):
        folder = GgufExporter(exact=exact).export(backbone, tmp_path / str(exact))
        _, read = read_model(folder / "model.gguf", backbone.config)
        for name, bank in backbone.banks.items():
            expected, found = bank.dequantized(bank.active), read[f"{name}.weight"]()
            if exact or bank.active != 4:
                assert torch.equal(found, expected), name
            else:  # -zero * scale in 11 bits
                lowest = expected.abs().amax() * 2
                assert 0 < float((found - expected).abs().max()) <= 2.0**-11 * float(lowest)
        fixed = backbone.fixed_tensors()
        assert all(torch.allclose(read[name](), tensor, rtol=0, atol=2e-7) for name, tensor in fixed.items())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma"])
def test_self_check_reads_model_and_adapter_again(family, tiny_backbone, tmp_path):
    backbone = mixed(tiny_backbone, family)
    exporter = GgufExporter(exact=True)
    found = self_check(exporter, backbone, exporter.export(backbone, tmp_path / "out"))
    assert found.tolerance == EXACT
    assert found.passed
    assert (tmp_path / "out" / "Modelfile").read_text() == "FROM ./model.gguf\nADAPTER ./adapter.gguf\n"


def test_types_are_the_smallest_that_hold_the_codes(tiny_backbone, tmp_path):
    backbone = mixed(tiny_backbone)
    exporter = GgufExporter()
    kinds = read_gguf(exporter.export(backbone, tmp_path / "out") / "model.gguf").kinds
    found = [kinds[f"blk.{layer}.attn_q.weight"].name for layer in range(5)]
    assert found == ["Q4_0", "Q4_0", "Q4_1", "Q8_0", "BF16"]
    assert kinds["token_embd.weight"].name == "BF16"
    assert kinds["blk.0.attn_norm.weight"].name == "F32"
    assert exporter.notes(backbone)[0] == "projections by type: 7 BF16, 14 Q4_0, 7 Q4_1, 7 Q8_0"
    symmetric = mixed(tiny_backbone, quantizers=table(symmetric=True))
    kinds = read_gguf(GgufExporter().export(symmetric, tmp_path / "symmetric") / "model.gguf").kinds
    assert kinds["blk.2.attn_q.weight"].name == "Q4_0"


@pytest.mark.parametrize("name", ["hqq", "int8"])
def test_other_grids_keep_their_codes(name, tiny_backbone, tmp_path):
    bits = {"hqq": 4, "int8": 8}[name]
    options = {"group_size": 32} if name == "hqq" else {}
    backbone = tiny_backbone(quantizers={bits: quantizers.create(name, **options)}, bits=(bits,))
    backbone.activate(Configuration.uniform(bits, 0, 3), seed=0)
    exporter = GgufExporter()
    folder = exporter.export(backbone, tmp_path / "out")
    assert self_check(exporter, backbone, folder).passed
    _, read = read_model(folder / "model.gguf", backbone.config)
    for key, bank in backbone.banks.items():
        expected = bank.dequantized(bits)
        assert float((read[f"{key}.weight"]() - expected).norm() / expected.norm()) < 1e-3


def test_what_has_no_type_is_refused_with_the_cure_or_written_in_float16(tiny_backbone, tmp_path):
    asymmetric = mixed(tiny_backbone, quantizers=table(symmetric=False))
    with pytest.raises(QuantizationError, match=r"further than 128 from their zero points.*portable.*--dense-bits 8"):
        GgufExporter().export(asymmetric, tmp_path / "out")
    exporter = GgufExporter(dense_bits=8)
    assert self_check(exporter, asymmetric, exporter.export(asymmetric, tmp_path / "dense")).passed
    nf4 = tiny_backbone(bits=(4,))
    nf4.activate(Configuration.uniform(4, 0, 3), seed=0)
    with pytest.raises(QuantizationError, match=r"nf4 has no scales and zero points.*portable.*--dense-bits 4"):
        GgufExporter().export(nf4, tmp_path / "out")
    small = tiny_backbone(quantizers={4: quantizers.create("affine", group_size=16)}, bits=(4,))
    small.activate(Configuration.uniform(4, 0, 3), seed=0)
    with pytest.raises(QuantizationError, match="groups of 16 weights are no whole number"):
        GgufExporter().export(small, tmp_path / "out")
    with pytest.raises(ConfigurationError, match="no DoRA"):
        GgufExporter().export(mixed(tiny_backbone, method=adapters.create("dora")), tmp_path / "out")
    with pytest.raises(UnsupportedModelError, match=r"no layout.*'gpt2'.*convert_hf_to_gguf"):
        GgufExporter().export(mixed(tiny_backbone, "gpt2"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapter_has_a_rank_for_each_projection_and_the_scale_in_b(tiny_backbone, tmp_path):
    backbone = mixed(tiny_backbone)
    contents = read_gguf(GgufExporter().export(backbone, tmp_path / "out") / "adapter.gguf")
    assert contents.metadata["adapter.lora.alpha"] == 0.0
    assert contents.metadata["general.type"] == "adapter"
    a, b = (contents.tensors[f"blk.3.attn_q.weight.lora_{part}"]() for part in "ab")
    assert (a.shape, b.shape) == ((8, 64), (64, 8))
    with backbone.stored_precision():
        delta = backbone.adapters.delta("model.layers.3.self_attn.q_proj")
    torch.testing.assert_close(torch.from_numpy(b @ a), permuted(delta, 4), rtol=0, atol=1e-5)
    assert not [name for name in contents.tensors if name.startswith("blk.2.")]


def test_rows_come_back():
    rows = torch.arange(24).reshape(12, 2)
    assert permuted(rows, 2)[:, 0].tolist() == [0, 6, 2, 8, 4, 10, 12, 18, 14, 20, 16, 22]
    assert torch.equal(restored(permuted(rows, 2), 2), rows)


def test_llama_3_frequencies_are_those_of_transformers():
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    config = LlamaConfig(hidden_size=64, num_attention_heads=2, rope_parameters=rope)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / 500000.0 ** (torch.arange(0, 32, 2).float() / 32)
    torch.testing.assert_close(plain / rope_factors(config), theirs)
    with pytest.raises(UnsupportedModelError, match="'yarn'"):
        architecture_of(LlamaConfig(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}))


def test_blocks_are_laid_out_as_in_ggml():
    codes, scale = np.arange(32)[None] % 16, np.array([0.5])
    assert blocks.pack_q4_0(codes, scale)[:4] == struct.pack("<e", 0.5) + bytes([0x00, 0x11])
    high = np.where(np.arange(32) == 17, 31, 16)[None]
    assert blocks.pack_q5_0(high, scale)[:8] == struct.pack("<eI", 0.5, 0xFFFFFFFF) + bytes([0x00, 0xF0])
    assert blocks.pack_q8_0(np.full((1, 32), -3), scale)[2:4] == bytes([253, 253])
    assert blocks.pack_q4_1(codes, scale, np.array([-1.0]))[2:4] == struct.pack("<e", -1.0)


def test_file_comes_back_with_metadata_of_every_kind(tmp_path):
    given = {
        "a.text": "ü",
        "a.flag": True,
        "a.number": 7,
        "a.real": 0.5,
        "a.words": ["x", ""],
        "a.numbers": [1, -2],
        "a.reals": [1.5],
    }
    values = np.arange(6, dtype=np.float32)
    entries = {name: Entry(blocks.F32, (2, 3), values.tobytes) for name in ("first", "second")}
    write_gguf(tmp_path / "file", given, entries)
    contents = read_gguf(tmp_path / "file")
    assert contents.metadata == given
    assert all(np.array_equal(read(), values.reshape(2, 3)) for read in contents.tensors.values())
    (tmp_path / "other").write_bytes(b"GGML....")
    with pytest.raises(ConfigurationError, match="no GGUF file"):
        read_gguf(tmp_path / "other")


def byte_level(before=(), *, regex=True):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4}
    backend = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*before, last]) if before else last
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template="{{ x }}")


def test_byte_pairs_are_told_with_what_cuts_the_text():
    from tokenizers import Regex, pre_tokenizers

    found = tokenizer_metadata(byte_level(), 6)
    assert found["tokenizer.ggml.model"] == "gpt2"
    assert found["tokenizer.ggml.pre"] == "gpt-2"
    assert found["tokenizer.ggml.tokens"] == ["<s>", "</s>", "a", "b", "ab", "[PAD5]"]
    assert found["tokenizer.ggml.token_type"] == [3, 3, 1, 1, 1, 5]
    assert found["tokenizer.ggml.merges"] == ["a b"]
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert (found["tokenizer.ggml.bos_token_id"], found["tokenizer.chat_template"]) == (0, "{{ x }}")
    digits = byte_level([pre_tokenizers.Digits(individual_digits=True)])
    assert tokenizer_metadata(digits, 5)["tokenizer.ggml.pre"] == "smollm"
    for digits, name in (("{1,3}", "llama-bpe"), ("", "qwen2")):
        pattern = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
            r"|\s+(?!\S)|\s+"
        ).replace("DIGITS", digits)
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        assert tokenizer_metadata(byte_level([split], regex=False), 5)["tokenizer.ggml.pre"] == name
    other = byte_level([pre_tokenizers.Whitespace()])
    with pytest.raises(UnsupportedModelError, match="--pre-tokenizer NAME"):
        tokenizer_metadata(other, 5)
    assert tokenizer_metadata(other, 5, pre_tokenizer="gpt-2")["tokenizer.ggml.pre"] == "gpt-2"


def test_pieces_score_in_the_order_of_merges():
    from tokenizers import Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "▁", "a", "▁a", "aa", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    model = models.BPE(vocabulary, [("a", "a"), ("▁", "a")], unk_token="<unk>", byte_fallback=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    found = tokenizer_metadata(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>"), len(pieces))
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.scores"][:7] == [-2.0, -3.0, -4.0, -5.0, -1.0, 0.0, -8.0]
    assert found["tokenizer.ggml.token_type"] == [2, 3, 1, 1, 1, 1, *[6] * 256]
    assert found["tokenizer.ggml.add_space_prefix"] is True
    backend.model = models.BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>")
    with pytest.raises(UnsupportedModelError, match="no tokens for single bytes"):
        tokenizer_metadata(PreTrainedTokenizerFast(tokenizer_object=backend), 2)


def test_words_are_refused(model_dir):
    from transformers import AutoTokenizer

    with pytest.raises(UnsupportedModelError, match=r"WordLevel.*convert_hf_to_gguf"):
        tokenizer_metadata(AutoTokenizer.from_pretrained(model_dir), 96)
