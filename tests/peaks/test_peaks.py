"""Foretold peaks against measured ones."""

from __future__ import annotations

import os
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch

from qratk.adapters.cut import Cut
from qratk.backbone.backbone import Backbone
from qratk.core.configuration import Configuration
from qratk.core.memory import PEAK_PARTS
from qratk.core.space import SearchSpace
from qratk.peaks.allocated import allocated_peak
from qratk.peaks.foretold import memory_model
from qratk.peaks.measure import measured_peak
from qratk.peaks.scratch import SCRATCH, multiplied_by_onednn, product_scratch, shortest_alike
from qratk.peaks.trace import PeakTracer, traced_peak
from qratk.peaks.uniform import UniformPeaks

ACTIVATIONS = {"batch_size": 4, "sequence_length": 48}
WEIGHTS = {"batch_size": 1, "sequence_length": 8}
CASES = {
    "activations": ACTIVATIONS,
    "weights": WEIGHTS,
    "checkpointing": {**ACTIVATIONS, "gradient_checkpointing": True},
    "dense_cache": {**WEIGHTS, "dense_cache": True},
}
CONFIGURATIONS = ("4:8 4:8 4:8", "2:4 3:16 16:8", "16:0 8:4 4:4")


def space_of(backbone, bits=(2, 4, 8), ranks=(4, 8, 16)):
    return SearchSpace(bits, ranks, tuple(shape.name for shape in backbone.shapes))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt_neox"])
def test_foretold_peak_is_the_measured_one_within_two_percent(family, case, tiny_backbone):
    for text in CONFIGURATIONS if family == "llama" else CONFIGURATIONS[1:2]:
        backbone, configuration = tiny_backbone(family), Configuration.from_text(text)
        foretold = traced_peak(backbone, configuration, **CASES[case])
        assert foretold.peak == pytest.approx(measured_peak(backbone, configuration, **CASES[case]), rel=0.02)
        assert sum(foretold.parts.values()) == foretold.peak
        assert set(foretold.parts) == set(PEAK_PARTS)


@pytest.mark.parametrize(("family", "case"), [("llama", "checkpointing"), ("gpt2", "weights")])
def test_shortened_models_foretell_what_the_whole_one_does(family, case, tiny_backbone):
    backbone = tiny_backbone(family, layers=7)
    space = space_of(backbone)
    memory, whole = memory_model(backbone, space, **CASES[case]), PeakTracer(backbone, **CASES[case])
    assert memory.training.source == "trace"
    for bits, rank in ((2, 4), (4, 8), (8, 16)):
        footprint = memory.footprint(space.uniform(bits, rank))
        foretold = sum(memory.training.uniform[bits, rank].values()) + footprint.weights + footprint.metadata
        assert foretold == pytest.approx(whole.trace(space.uniform(bits, rank)).peak, rel=0.005)


@pytest.mark.parametrize("case", ["activations", "checkpointing"])
def test_searches_never_count_less_than_is_taken(case, tiny_backbone):
    import numpy as np

    backbone = tiny_backbone(layers=5)
    space, rng = space_of(backbone, bits=(2, 3, 4, 8, 16), ranks=(0, 4, 16)), np.random.default_rng(0)
    memory, tracer = memory_model(backbone, space, **CASES[case]), PeakTracer(backbone, **CASES[case])
    for configuration in [space.random(rng) for _ in range(4)]:
        peak = tracer.trace(configuration).peak
        assert memory.bytes(configuration, "training") > 0.99 * peak
    # Closely, but for what no sum over layers can say: the largest workspace, and no adapter before some layer.
    configuration = Configuration.of([2, 4, 2, 8, 3], [4, 16, 4, 16, 16])
    assert memory.bytes(configuration, "training") < 1.05 * tracer.trace(configuration).peak


def test_counted_training_bytes_grow_with_every_rank(tiny_backbone):
    import numpy as np

    backbone = tiny_backbone(granularity="linear")
    table = memory_model(backbone, space_of(backbone, ranks=(0, 4, 8, 16)), **WEIGHTS).table("training", "rank")
    assert (np.diff(table, axis=1) > 0).all()


def test_blocks_that_differ_are_all_traced(tiny_backbone):
    backbone = tiny_backbone(layers=6)
    assert UniformPeaks(backbone, **WEIGHTS).cuts == (3, 4)
    backbone.config.layer_types = ["full_attention", "sliding_attention"] * 3
    assert UniformPeaks(backbone, **WEIGHTS).cuts == (6,)


def test_ranks_that_are_trained_alike_are_traced_once(tiny_backbone, monkeypatch):
    traced = []
    records = PeakTracer.records
    monkeypatch.setattr(PeakTracer, "records", lambda self, c, **how: traced.append(str(c)) or records(self, c, **how))
    wide = UniformPeaks(tiny_backbone(method=Cut(width=8)), **WEIGHTS)
    assert wide.phases(2) is wide.phases(8)
    assert len(traced) == 1
    assert wide.phases(16) != wide.phases(8)
    narrow = UniformPeaks(tiny_backbone(), **WEIGHTS)
    assert narrow.phases(2) != narrow.phases(8)


def test_model_that_cannot_be_traced_is_estimated_and_said(tiny_backbone, monkeypatch, caplog):
    backbone = tiny_backbone()

    def fail(*args, **kwargs):
        raise RuntimeError("no meta kernel")

    monkeypatch.setattr(type(backbone.base), "forward", fail)
    memory = memory_model(backbone, space_of(backbone), **WEIGHTS)
    assert memory.training.source == "estimate"
    assert memory == memory_model(backbone, space_of(backbone), **WEIGHTS, trace=False)
    assert "no meta kernel" in caplog.text


def test_trace_leaves_the_backbone_as_it_was(tiny_backbone, tiny_batch):
    backbone = tiny_backbone(bits=(4,))
    backbone.activate(Configuration.uniform(4, 4, 3), seed=0)
    before = backbone.model(**tiny_batch).logits
    traced_peak(backbone, Configuration.uniform(2, 8, 3), **CASES["checkpointing"])
    assert torch.equal(backbone.model(**tiny_batch).logits, before)
    assert backbone.configuration == Configuration.uniform(4, 4, 3)


FORWARD, BACKWARD = SCRATCH  # both take (q, k, v); backward has the gradient before them


@contextmanager
def onednn(enabled):
    """Context in which torch may leave products to oneDNN or may not: a choice only where the processor is able to."""
    before = torch.backends.mkldnn.enabled
    torch._C._set_mkldnn_enabled(enabled)  # `torch.backends.mkldnn.flags` sets TF32 too, with a warning
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "length", "width"), [(4, 48, 16), (2, 200, 64), (1, 900, 64)])
def test_scratch_of_fused_attention_on_the_cpu_is_what_its_kernels_take(heads, length, width, dtype, enabled):
    q = torch.ones(2, heads, length, width, dtype=dtype)
    with onednn(enabled):
        out, sums = FORWARD(q, q, q, 0.0, True)
        taken = allocated_peak(lambda: FORWARD(q, q, q, 0.0, True), q.device)
        assert taken == out.nbytes + sums.nbytes + SCRATCH[FORWARD]((q, q, q))
        for grad in (torch.ones_like(q), torch.ones_like(q.transpose(1, 2)).transpose(1, 2)):
            taken = allocated_peak(partial(BACKWARD, grad, q, q, q, out, sums, 0.0, True), q.device)
            assert taken == 3 * q.nbytes + SCRATCH[BACKWARD]((grad, q, q, q))


@pytest.mark.parametrize("able", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_onednn_multiplies_what_the_processor_is_able_to_unless_it_is_switched_off(dtype, able, monkeypatch):
    for probe in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
        monkeypatch.setattr(torch.ops.mkldnn, probe, lambda: able)
    assert multiplied_by_onednn(dtype) == (able and dtype != torch.float32)
    with onednn(False):
        assert not multiplied_by_onednn(dtype)


@pytest.mark.parametrize(("heads", "busy"), [(1, 2), (3, 4)])
def test_scratch_of_products_is_added_for_every_thread_that_is_busy_where_onednn_multiplies(heads, busy, monkeypatch):
    from qratk.peaks import scratch

    q, asked = torch.ones(2, heads, 1000, 64, dtype=torch.bfloat16, device="meta"), []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(scratch, "product_scratch", lambda *sizes: asked.append(sizes) or 10**6)
    counted = []
    for able in (False, True):
        monkeypatch.setattr(scratch, "multiplied_by_onednn", lambda dtype, able=able: able)
        counted.append(SCRATCH[BACKWARD]((q, q, q, q)))
    assert counted[1] - counted[0] == busy * 10**6
    assert asked == [(1000, 1000, 64, torch.bfloat16, 4)]


@pytest.mark.parametrize(("queries", "keys"), [(48, 48), (200, 200), (500, 700), (1100, 1100), (900, 1030)])
def test_scratch_of_products_is_measured_on_fewer_blocks_of_the_same_sizes(queries, keys):
    def blocks(queries, keys):
        step = 256 if queries >= 768 else 64 if queries >= 192 else 32
        return [
            {min(size, length - at) for at in range(0, length, size)} for length, size in ((queries, step), (keys, 512))
        ]

    short = shortest_alike(queries, keys)
    assert blocks(*short) == blocks(queries, keys)
    assert short <= (1023, 1023)
    long, less = (product_scratch(*lengths, 16, torch.bfloat16, 1) for lengths in ((queries, keys), short))
    assert long == less
    assert (long > 0) == multiplied_by_onednn(torch.bfloat16)


def test_allocator_events_give_the_peak_of_known_tensors():
    def action():
        first = torch.zeros(1000)
        second = first + 1.0  # 8,000 bytes here
        del first
        return second.sum()

    assert 8000 <= allocated_peak(action, torch.device("cpu")) < 8100


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*")
def test_lightning_takes_what_is_foretold():
    from lightning import Trainer

    from qratk.peaks.measure import resident_bytes
    from qratk.training.module import FineTuneModule
    from qratk.training.trainers import quiet_lightning

    module = FineTuneModule("embedded", dense_cache="off")
    backbone, configuration = module.backbone, Configuration.from_text("4:8 2:16 8:4 4:2 2:8 8:8 " * 2)
    backbone.build_bank((2, 4, 8))
    module.activate(configuration)
    backbone.keep_active()
    ids = torch.ones((4, 96), dtype=torch.int64)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def fit():
        with quiet_lightning():
            options = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
            trainer = Trainer(max_steps=2, accelerator="cpu", enable_progress_bar=False, **options)
            trainer.fit(module, train_dataloaders=torch.utils.data.DataLoader([batch] * 2, batch_size=None))

    foretold = traced_peak(backbone, configuration, batch_size=4, sequence_length=96).peak
    measured = resident_bytes(backbone) + allocated_peak(fit, torch.device("cpu"))
    assert foretold == pytest.approx(measured, rel=0.02)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", ["activations", "checkpointing"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_foretold_peak_on_cuda_is_that_of_its_counter(family, case, tiny_backbone):
    # Large enough that what the allocator and cuBLAS hold by themselves does not decide.
    sizes = {"batch_size": 8, "sequence_length": 64, "gradient_checkpointing": case == "checkpointing"}
    backbone = tiny_backbone(family, layers=6, hidden=1024, intermediate=4096, compute_dtype="bfloat16")
    backbone.build_bank((2, 4, 8))
    backbone.model.to("cuda")
    configuration = Configuration.of([2, 4, 8] * 2, [4, 8, 16] * 2)
    foretold = traced_peak(backbone, configuration, **sizes)
    assert foretold.peak == pytest.approx(measured_peak(backbone, configuration, **sizes), rel=0.05)


@pytest.mark.slow
@pytest.mark.skipif("QRATK_SHARED" not in os.environ, reason="QRATK_SHARED names no directory of models")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["stories260k", "babyllama105", "deep12"])
def test_foretold_peak_of_real_models_is_the_measured_one(name, checkpointing, tiny_backbone):
    directory = Path(os.environ["QRATK_SHARED"]) / "models" / name
    table = tiny_backbone().table.quantizers
    for batch_size, length in ((8, 128), (1, 16)):
        sizes = {"batch_size": batch_size, "sequence_length": length, "gradient_checkpointing": checkpointing}
        backbone = Backbone.load(directory, quantizers=table)
        count = len(backbone.layers)
        configuration = Configuration.of([(2, 3, 4, 8, 16)[i % 5] for i in range(count)], [8] * count)
        without_weights = Backbone.load(directory, quantizers=table, weights=False)
        foretold = traced_peak(without_weights, configuration, **sizes)
        assert foretold.peak == pytest.approx(measured_peak(backbone, configuration, **sizes), rel=0.05)
