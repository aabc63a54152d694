"""Training peaks of a whole space from a few traces: exact for uniform configurations, a bound for the others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from torch import nn

from qratk.backbone.backbone import Backbone
from qratk.backbone.layers import find_blocks
from qratk.core.configuration import Configuration
from qratk.core.memory import PEAK_PARTS, PeakBytes
from qratk.core.space import SearchSpace
from qratk.peaks.trace import PeakTracer, PhaseRecord, unpacking_bytes

_logger = logging.getLogger(__name__)
_CUTS = (3, 4)  # blocks of the shortened models: the fewest with a first, a middle and a last one
Parts = dict[str, int]


class UniformPeaks:
    """Peaks of uniform configurations of a backbone at one batch size and length.

    Where all blocks are alike, models of three and four blocks are traced, and what one block adds to each phase is
    taken as many times as there are blocks. Bits change only what is stored and what unpacking takes, which is added
    afterwards; between two ranks over 0 every phase is linear in the rank. Rank 0 stands for a model in which only the
    first and the last block have adapters: without any there is nothing to train. Blocks before the first adapter keep
    nothing, so that configurations of many such are counted too high.
    """

    def __init__(self, backbone: Backbone, *, dense_cache: bool = False, **options: Any) -> None:
        # Not the backbone itself, whose weights would then outlive it here.
        self.table, self.shapes, self.dtype = backbone.table, backbone.shapes, backbone.compute_dtype
        self.dense_cache = dense_cache
        modules = find_blocks(backbone.base)[1]
        self.blocks = len(modules)
        shorten = self.blocks > _CUTS[1] and _alike(modules, backbone.config)
        self.cuts = _CUTS if shorten else (self.blocks,)
        self._tracers = [PeakTracer(backbone, blocks=k, dense_cache=dense_cache, **options) for k in self.cuts]
        self._method = backbone.adapters.method
        self._traced: dict[Configuration, dict[str, PhaseRecord]] = {}

    def phases(self, rank: int, ends: int = 0) -> dict[str, PhaseRecord]:
        """What each phase takes at a rank, packed weights left out; the first and the last block may have another."""
        wanted = [self._configuration(tracer, rank, ends or rank) for tracer in self._tracers]
        key = self._method.trained(wanted[0])  # ranks that are trained alike take the same
        if key not in self._traced:
            made = zip(self._tracers, wanted, strict=True)
            short, *longer = (tracer.records(configuration, unpacking=False) for tracer, configuration in made)
            steps = self.blocks - self.cuts[0]
            self._traced[key] = _combined(short, longer[0], lambda a, b: a + steps * (b - a)) if longer else short
        return self._traced[key]

    def _configuration(self, tracer: PeakTracer, rank: int, ends: int) -> Configuration:
        bits = next(iter(self.table.quantizers))  # the lowest: it makes dense weights in any dtype
        layers = len(tracer.twin.layers)
        in_block = layers // len(find_blocks(tracer.twin.base)[1])
        ranks = [ends if min(i, layers - 1 - i) < in_block else rank for i in range(layers)]
        return Configuration.of([bits] * layers, ranks)

    def between(self, low: int, high: int, rank: int) -> dict[str, PhaseRecord]:
        """What each phase takes at a rank between two that are traced."""
        if rank in (low, high):
            return self.phases(rank)
        share = (rank - low) / (high - low)
        return _combined(self.phases(low), self.phases(high), lambda a, b: round(a + share * (b - a)))

    def peak(self, phases: Mapping[str, PhaseRecord], bits: int) -> Parts:
        """Peak by part with every layer at `bits`, packed weights left out."""
        moments = [record.parts for record in phases.values()]
        made = self._made(bits)
        if self.dense_cache:  # kept ones are in the workspace, but for those that are used as they are stored
            spared = self._dense_bytes() - sum(dense for dense, _ in made)
            moments = [_more_workspace(parts, -spared) for parts in moments]
        else:
            most: dict[tuple[int, int], int] = {}
            for shape, (dense, extra) in zip(self._weight_shapes(), made, strict=True):
                most[shape] = max(most.get(shape, 0), dense + extra)
            opened = [(shape, parts) for record in phases.values() for shape, parts in record.unpacking.items()]
            moments += [_more_workspace(parts, most[shape]) for shape, parts in opened]
        largest = max(moments, key=_without_weights)
        return {part: 0 if part == "weights" else largest.get(part, 0) for part in PEAK_PARTS}

    def _weight_shapes(self) -> list[tuple[int, int]]:
        return [(d_out, d_in) for shape in self.shapes for _, d_in, d_out in shape.projections]

    def _dense_bytes(self) -> int:
        return sum(d_in * d_out for d_out, d_in in self._weight_shapes()) * self.dtype.itemsize

    def _made(self, bits: int) -> list[tuple[int, int]]:
        """Of each projection, bytes of its dense weight, if one is made, and what making it takes beyond."""
        found = []
        for layer in self.shapes:
            for local, d_in, d_out in layer.projections:
                chosen = self.table.choose(layer.name, local, (d_out, d_in), bits)
                extra, shared = unpacking_bytes(chosen.quantizer, chosen.bits, (d_out, d_in), self.dtype)
                found.append((0 if shared else d_in * d_out * self.dtype.itemsize, extra))
        return found


_KEPT: WeakKeyDictionary[Backbone, dict[tuple[tuple[str, Any], ...], UniformPeaks]] = WeakKeyDictionary()


def training_peaks(backbone: Backbone, space: SearchSpace, **options: Any) -> PeakBytes | None:
    """As `traced_training`; None, with a warning in the log, when the model cannot be traced."""
    if min(options["batch_size"], options["sequence_length"]) < 1 or space.num_layers != len(backbone.layers):
        return None  # an error elsewhere
    try:
        return traced_training(backbone, space, **options)
    except Exception as error:  # a model's own code raises whatever it likes
        reason = (str(error).strip().splitlines() or [""])[0]
        _logger.warning("the training peak is an estimate: %s: %s", type(error).__name__, reason)
        return None


def traced_training(backbone: Backbone, space: SearchSpace, **options: Any) -> PeakBytes:
    """Training peaks over storage and fixed bytes of every configuration of a space; options as for `PeakTracer`.

    The sum of the tables is an upper bound, met by uniform configurations of the bit-width whose weights take most to
    unpack, and monotone: layers of mixed bits are charged with the largest workspace of the space, and mixed ranks with
    the mean of the uniform peaks, which a maximum over phases cannot exceed.
    """
    kept = _KEPT.setdefault(backbone, {})
    key = tuple(sorted({**options, "dropout": backbone.adapters.options.dropout}.items()))
    if key not in kept:
        kept[key] = UniformPeaks(backbone, **options)
    peaks = kept[key]
    by_rank = _by_rank(peaks, space)
    uniform = {(b, r): peaks.peak(phases, b) for r, phases in by_rank.items() for b in space.bits}
    totals = [max(sum(uniform[b, r].values()) for b in space.bits) for r in space.ranks]
    return _tables(backbone, space, totals, uniform)


def _by_rank(peaks: UniformPeaks, space: SearchSpace) -> dict[int, dict[str, PhaseRecord]]:
    adapted = [rank for rank in space.ranks if rank]
    found = {rank: peaks.between(adapted[0], adapted[-1], rank) for rank in adapted}
    if 0 not in space.ranks:
        return found
    # A layer without an adapter keeps what the gradient of one before it needs: so the first block has one. With
    # checkpointing the most is taken where the last one is computed anew: it has one too.
    return {0: peaks.phases(0, ends=adapted[0] if adapted else 0), **found}


def _tables(
    backbone: Backbone, space: SearchSpace, totals: list[int], uniform: dict[tuple[int, int], Parts]
) -> PeakBytes:
    shapes = backbone.shapes
    fixed = sum(tensor.nbytes for tensor in backbone.fixed_tensors().values())
    stored = np.array([[backbone.adapter_bytes(shape, rank) for rank in space.ranks] for shape in shapes])
    weights = np.array([backbone.adapter_bytes(shape, 1) for shape in shapes], dtype=float)
    # Beyond what is stored; a higher rank never takes less, whatever the phase.
    excess = np.maximum.accumulate(np.array(totals, dtype=float)) - fixed - stored.sum(axis=0)
    more = np.ceil(np.outer(weights / weights.sum(), np.maximum.accumulate(excess - excess[0]))).astype(int)
    return PeakBytes(
        constant=int(excess[0]),
        by_rank=tuple(tuple(row) for row in more.tolist()),
        source="trace",
        uniform=uniform,
    )


def _more_workspace(parts: Mapping[str, int], size: int) -> Parts:
    return {**parts, "workspace": parts.get("workspace", 0) + size}


def _without_weights(parts: Mapping[str, int]) -> int:
    return sum(size for part, size in parts.items() if part != "weights")


def _combined(
    first: dict[str, PhaseRecord], second: dict[str, PhaseRecord], of: Callable[[int, int], int]
) -> dict[str, PhaseRecord]:
    def parts(a: Mapping[str, int], b: Mapping[str, int]) -> Parts:
        return {part: of(a.get(part, 0), b.get(part, 0)) for part in PEAK_PARTS}

    return {
        phase: PhaseRecord(
            of(record.total, second[phase].total),
            parts(record.parts, second[phase].parts),
            {shape: parts(found, second[phase].unpacking[shape]) for shape, found in record.unpacking.items()},
        )
        for phase, record in first.items()
    }


def _alike(modules: nn.ModuleList, config: Any) -> bool:
    kinds = {tuple((name, tuple(p.shape), p.dtype) for name, p in block.named_parameters()) for block in modules}
    return len(kinds) == 1 and len(set(getattr(config.get_text_config(), "layer_types", None) or ())) <= 1
