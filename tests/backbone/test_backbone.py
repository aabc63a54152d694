"""The backbone: bytes, fallbacks, references, digests, loading."""

from __future__ import annotations

import pytest
import torch

from qratk.backbone.backbone import Backbone
from qratk.backbone.loading import resolve_dtype
from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError, QuantizationError, UnsupportedModelError
from qratk.core.space import SearchSpace
from qratk.peaks.foretold import memory_model
from qratk.quantizers.base import quantizers

BITS, RANKS = (2, 3, 4, 8, 16), (0, 4, 8)


def space_of(backbone, bits=BITS, ranks=RANKS):
    return SearchSpace(bits, ranks, tuple(shape.name for shape in backbone.shapes))


def measured_storage(backbone):
    """Bytes of the tensors that the active configuration stores: packed weights, biases, 16-bit adapters."""
    packed = sum(
        b.variants[b.active].nbytes + (0 if b.bias is None else b.bias.nbytes) for b in backbone.banks.values()
    )
    return packed + sum(p.to(torch.bfloat16).nbytes for _, p in backbone.trainable_parameters())


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gpt2"])
@pytest.mark.parametrize("granularity", ["block", "sublayer", "fused", "linear"])
def test_predicted_storage_is_measured_storage(family, granularity, tiny_backbone):
    import numpy as np

    backbone = tiny_backbone(family, bits=BITS, granularity=granularity, hidden=40, intermediate=100)
    space, rng = space_of(backbone), np.random.default_rng(0)
    model = memory_model(backbone, space, trace=False)
    for _ in range(4):
        configuration = space.random(rng)
        backbone.activate(configuration, seed=0)
        assert model.footprint(configuration).storage_bytes == measured_storage(backbone)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_fixed_bytes_are_those_of_all_other_tensors_tied_ones_once(family, tiny_model, tiny_backbone):
    model = tiny_model(family)
    backbone = tiny_backbone(family)
    inside = sum(
        p.nbytes for b in backbone.banks.values() for p in [b.reference, *([b.bias] if b.bias is not None else [])]
    )
    total = sum(parameter.nbytes for parameter in model.parameters())
    assert memory_model(backbone, space_of(backbone, bits=(8,)), trace=False).fixed_bytes == total - inside


def test_code_tables_of_nf4_are_counted_once_in_fixed(tiny_backbone):
    backbone = tiny_backbone()
    without = memory_model(backbone, space_of(backbone, bits=(2, 8)), trace=False).fixed_bytes
    assert memory_model(backbone, space_of(backbone, bits=(2, 4, 8)), trace=False).fixed_bytes == without + 1088


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_memory_model_needs_no_weights(family, tiny_model, tiny_backbone, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    options = {"quantizers": tiny_backbone(family).table.quantizers}
    meta = Backbone.load(tmp_path, weights=False, **options)
    real = Backbone.from_model(model, **options)
    arguments = {"batch_size": 3, "sequence_length": 17}
    assert meta.on_meta
    assert memory_model(meta, space_of(meta), **arguments) == memory_model(real, space_of(real), **arguments)
    with pytest.raises(QuantizationError, match="without weights"):
        meta.activate(Configuration.uniform(16, 0, 3), seed=0)


def test_peaks_grow_with_batch_and_length_and_checkpointing_lowers_training(tiny_backbone):
    backbone = tiny_backbone()
    space = space_of(backbone)
    configuration = space.uniform(4, 8)

    def footprint(**arguments):
        return memory_model(backbone, space, **arguments).footprint(configuration)

    small, large = footprint(batch_size=1, sequence_length=64), footprint(batch_size=4, sequence_length=64)
    checkpointed = footprint(batch_size=4, sequence_length=64, gradient_checkpointing=True)
    assert small.training_bytes < checkpointed.training_bytes < large.training_bytes
    assert small.serving_bytes < large.serving_bytes < large.training_bytes
    # 16 bytes an adapter weight in training, 2 of them stored; beyond that, activations of the rank's width.
    other = memory_model(backbone, space, batch_size=1, sequence_length=64)
    grown = other.footprint(space.uniform(4, 4))
    assert small.training_bytes - grown.training_bytes > 8 * (small.adapters - grown.adapters)


def test_serving_adds_the_key_value_cache(tiny_backbone):
    backbone = tiny_backbone()  # 2 key-value heads of 16, 3 blocks, float32
    space = space_of(backbone)
    one, two = (
        memory_model(backbone, space, sequence_length=n, trace=False).footprint(space.smallest) for n in (64, 128)
    )
    assert two.serving_bytes - one.serving_bytes == 64 * 3 * (2 * 2 * 16) * 4


def test_a_space_of_other_layers_is_refused(tiny_backbone):
    with pytest.raises(ConfigurationError, match="build the space from the model's shapes"):
        memory_model(tiny_backbone(), SearchSpace((4,), (8,), ("a", "b")))


def test_bits_without_a_quantizer_are_refused(tiny_backbone):
    backbone = tiny_backbone(quantizers={4: quantizers.create("nf4")})
    with pytest.raises(ConfigurationError, match="no quantizer for 2 bits"):
        backbone.build_bank([2])
    with pytest.raises(ConfigurationError, match=r"does \(4,\) bits, not 3"):
        tiny_backbone(quantizers={3: quantizers.create("nf4")})


def test_shapes_that_a_quantizer_cannot_take_fall_back_visibly_and_exactly(tiny_backbone, tiny_batch):
    # 40 * 40 is 25 groups of 64 and 50 of 32, no multiples of 4, but 100 of 16. 27 * 40 fits no group at 2 bits.
    backbone = tiny_backbone(
        bits=(2, 4),
        hidden=40,
        intermediate=27,
        quantizers={2: quantizers.create("hqq"), 4: quantizers.create("nf4")},
    )
    fallbacks = {(f.layer, f.projection): f for f in backbone.fallbacks}
    smaller = fallbacks["model.layers.0", "self_attn.q_proj"]
    assert "group_size=16" in smaller.used
    assert "at 2 bits" in smaller.used
    other = fallbacks["model.layers.0", "mlp.up_proj"]
    assert other.used.startswith("nf4")
    assert "27 x 40" in other.reason
    assert "instead of hqq" in str(other)
    backbone.activate(Configuration.uniform(2, 4, 3), seed=0)
    footprint = memory_model(backbone, space_of(backbone, bits=(2, 4)), trace=False).footprint(backbone.configuration)
    assert footprint.storage_bytes == measured_storage(backbone)
    assert bool(backbone.model(**tiny_batch).logits.isfinite().all())


def test_no_fallback_is_reported_where_none_was_needed(tiny_backbone):
    assert tiny_backbone(bits=BITS).fallbacks == ()


def test_build_bank_is_idempotent_and_survives_the_release(tiny_backbone):
    backbone = tiny_backbone(bits=(2, 4), bank_dir=None)
    held = {name: dict(bank.variants) for name, bank in backbone.banks.items()}
    backbone.build_bank([4, 2])
    assert all(bank.variants[4] is held[name][4] for name, bank in backbone.banks.items())
    backbone.release_reference()
    backbone.release_reference()
    backbone.build_bank([2, 4])
    with pytest.raises(QuantizationError, match="released"):
        backbone.build_bank([8])


@pytest.mark.parametrize("on_ladder", [False, True])
def test_sixteen_bits_stay_after_the_release_only_if_they_are_in_the_bank(on_ladder, tiny_backbone, tiny_batch):
    backbone = tiny_backbone(bits=(4, 16) if on_ladder else (4,))
    with torch.no_grad():
        before = backbone.model(**tiny_batch).logits
        backbone.release_reference()
        if on_ladder:
            backbone.activate(Configuration.uniform(16, 0, 3), seed=0)
            assert torch.equal(backbone.model(**tiny_batch).logits, before)
        else:
            with pytest.raises(QuantizationError, match="load the model again"):
                backbone.activate(Configuration.uniform(16, 0, 3), seed=0)


def test_a_failed_switch_changes_nothing(tiny_backbone):
    backbone = tiny_backbone(bits=(2, 4))
    configuration = Configuration.of([2, 4, 2], [4, 4, 4])
    backbone.activate(configuration, seed=0)
    with pytest.raises(QuantizationError):
        backbone.activate(Configuration.of([4, 4, 8], [8, 8, 8]), seed=0)
    assert [bank.active for _, bank in backbone.layers[0].modules] == [2] * 7
    assert {p.shape[0] for n, p in backbone.trainable_parameters() if "lora_A" in n} == {4}
    with pytest.raises(ConfigurationError, match="3 layers"):
        backbone.activate(Configuration.uniform(2, 4, 2), seed=0)


def test_sixteen_bits_are_the_rounded_weights_of_a_float32_checkpoint(tiny_model, tiny_backbone):
    model = tiny_model()
    weight = torch.randn_like(model.model.layers[0].mlp.up_proj.weight)
    model.model.layers[0].mlp.up_proj.weight.data = weight
    backbone = Backbone.from_model(model, quantizers={})
    bank = backbone.banks["model.layers.0.mlp.up_proj"]
    assert torch.equal(bank.reference, weight)
    assert torch.equal(bank.dequantized(16), weight.bfloat16().float())


def test_digest_depends_on_weights_and_settings_and_survives_the_release(tiny_backbone):
    backbone = tiny_backbone(bits=(4,))
    digest = tiny_backbone(bits=(4,)).digest()
    backbone.release_reference()
    backbone.activate(Configuration.uniform(4, 4, 3), seed=0)
    assert backbone.digest() == digest
    others = [
        tiny_backbone(seed=1),
        tiny_backbone(granularity="linear"),
        tiny_backbone(quantizers={2: quantizers.create("hqq", group_size=16)}),
    ]
    assert len({digest, *(other.digest() for other in others)}) == 4


def test_dense_cache_gives_the_same_logits_to_the_bit(tiny_backbone, tiny_batch):
    backbone = tiny_backbone(bits=(2, 4, 8))
    backbone.activate(Configuration.of([2, 4, 8], [4, 0, 8]), seed=1)
    with torch.no_grad():
        expected = backbone.model(**tiny_batch).logits
        backbone.dense_cache(True)
        assert torch.equal(backbone.model(**tiny_batch).logits, expected)
        assert torch.equal(backbone.model(**tiny_batch).logits, expected)


def test_a_stored_model_loads_in_its_own_dtype(tiny_model, tiny_batch, tmp_path):
    model = tiny_model()
    with torch.no_grad():
        expected = model(**tiny_batch).logits
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="tokenizer"):
        Backbone.load(tmp_path, quantizers={})
    from qratk.backbone.loading import load_model

    backbone = Backbone.from_model(
        load_model(str(tmp_path), trust_remote_code=False, weights=True), quantizers={}, compute_dtype="float32"
    )
    assert {bank.reference.dtype for bank in backbone.banks.values()} == {torch.bfloat16}
    with torch.no_grad():
        assert torch.equal(backbone.model(**tiny_batch).logits, expected)


def test_a_model_that_is_not_there_is_a_clear_error(tmp_path):
    with pytest.raises(UnsupportedModelError, match="cannot be loaded"):
        Backbone.load(tmp_path, quantizers={}, weights=False)


def test_unknown_compute_dtype_is_refused():
    assert resolve_dtype("bfloat16") == torch.bfloat16
    with pytest.raises(ConfigurationError, match="compute_dtype"):
        resolve_dtype("int8")
