"""Bytes: what a configuration takes, and what it may take (Eq. 2, 5, 7, 21-23)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from qratk.core.configuration import Configuration, Knob
from qratk.core.errors import ConfigurationError, InfeasibleBudgetError
from qratk.core.space import SearchSpace

Scope = Literal["storage", "training", "serving"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
PEAK_PARTS = ("weights", "fixed", "adapters", "gradients", "optimizer", "activations", "logits", "workspace")
"""What a training peak is made of; the weights are packed, the workspace holds dense ones."""

_UNITS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str | int | float) -> int:
    """Number of bytes meant by a number or by text such as "5.5GiB" (binary) or "6 GB" (decimal), rounded down."""
    if isinstance(text, int | float) and not isinstance(text, bool):
        text = repr(text)
    match = _SIZE.fullmatch(str(text))
    if match is None or match[2].upper() not in _UNITS:
        raise ConfigurationError(f"{text!r} is not a size; write a number and a unit, as in '5.5GiB' or '800MB'")
    size = float(match[1]) * _UNITS[match[2].upper()]
    if not 1 <= size < math.inf:
        raise ConfigurationError(f"a size must be positive and finite, got {text!r}")
    return int(size)


def format_bytes(size: float) -> str:
    """Size in binary units, four significant digits, as in '5.126 GiB'."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(size) >= factor:
            return f"{size / factor:.4g} {unit}"
    return f"{size:.0f} B"


@dataclass(frozen=True)
class LayerShape:
    """What of a layer decides its bytes: its target projections as (name, d_in, d_out), and its constant bytes.

    `constant_bytes` are those of the biases of the projections: stored with the layer whatever the choice.
    """

    name: str
    projections: tuple[tuple[str, int, int], ...]
    constant_bytes: int = 0

    @property
    def parameters(self) -> int:
        """Number of weights that the bit-width applies to, N(W)."""
        return sum(d_in * d_out for _, d_in, d_out in self.projections)

    @property
    def largest_rank(self) -> int:
        """The rank beyond which an adapter can say nothing more on any projection of the layer."""
        return max(min(d_in, d_out) for _, d_in, d_out in self.projections)

    def adapter_parameters(self, rank: int, input_group: int = 1) -> int:
        """Number of adapter weights at a rank (Eq. 23), `input_group` inputs being pooled into one."""
        return sum(rank * (d_in // input_group + d_out) for _, d_in, d_out in self.projections)


def require_ranks(shapes: Sequence[LayerShape], ranks: Iterable[int]) -> None:
    """Raise `ConfigurationError` for a rank above every matrix of some layer."""
    largest = max(ranks, default=0)
    for shape in shapes:
        if largest > shape.largest_rank:
            raise ConfigurationError(
                f"rank {largest} is above the matrices of {shape.name}: give ranks of at most {shape.largest_rank}"
            )


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of one layer: weights and metadata by bit-width, adapters by rank, and what never changes."""

    weights: Mapping[int, int]
    metadata: Mapping[int, int]
    adapters: Mapping[int, int]
    constant: int = 0


@dataclass(frozen=True)
class Footprint:
    """Bytes of a configuration by part. `fixed`: embeddings, head and norms, outside Eq. 21 but never hidden.

    `storage_bytes` is Eq. 21. `training_bytes` is the peak of fine-tuning this configuration alone, without the rest of
    the bank; `serving_bytes` is an estimated peak.
    """

    weights: int
    metadata: int
    adapters: int
    fixed: int
    training_bytes: int
    serving_bytes: int

    @property
    def storage_bytes(self) -> int:
        """Bytes of all stored tensors of the layers: packed weights, biases, metadata, adapters (Eq. 21)."""
        return self.weights + self.metadata + self.adapters

    @property
    def total_bytes(self) -> int:
        """Bytes of all stored tensors of the model: `storage_bytes` and `fixed`."""
        return self.storage_bytes + self.fixed

    def bytes(self, scope: Scope) -> int:
        """The figure that a budget of this scope limits."""
        return {"storage": self.storage_bytes, "training": self.training_bytes, "serving": self.serving_bytes}[scope]


@dataclass(frozen=True)
class PeakBytes:
    """How a peak grows over storage: constant + storage + `per_adapter_byte` times the adapters' bytes + a table.

    `by_rank`, (L, rungs) or empty, is what each layer adds at each rank. `source` says whether the figures were traced
    or are an estimate. `uniform` has the peaks of uniform configurations by (bits, rank) and by part, packed weights
    left out: the sum above is an upper bound to them.
    """

    constant: int = 0
    per_adapter_byte: float = 0.0
    by_rank: tuple[tuple[int, ...], ...] = ()
    source: Literal["trace", "estimate"] = "estimate"
    uniform: Mapping[tuple[int, int], Mapping[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class MemoryModel:
    """Exact bytes of any configuration of a space; every scope is a constant plus one term a layer and knob.

    Args:
        space: the ladders and layers.
        layers: bytes of each layer, (L,).
        parameters: weights of each layer that the bit-width applies to, (L,); they weigh the average bits.
        fixed_bytes: embeddings, head and norms.
        training, serving: what a peak takes beyond storage and fixed bytes.
    """

    space: SearchSpace
    layers: tuple[LayerBytes, ...]
    parameters: tuple[int, ...]
    fixed_bytes: int = 0
    training: PeakBytes = field(default_factory=PeakBytes)
    serving: PeakBytes = field(default_factory=PeakBytes)

    def __post_init__(self) -> None:
        if not len(self.layers) == len(self.parameters) == self.space.num_layers:
            raise ConfigurationError(
                f"bytes and parameters of {self.space.num_layers} layers are needed, "
                f"got {len(self.layers)} and {len(self.parameters)}"
            )

    @cached_property
    def _weights(self) -> NDArray[np.int64]:
        return np.array([[b.weights[q] + b.constant for q in self.space.bits] for b in self.layers], dtype=np.int64)

    @cached_property
    def _metadata(self) -> NDArray[np.int64]:
        return np.array([[b.metadata[q] for q in self.space.bits] for b in self.layers], dtype=np.int64)

    @cached_property
    def _adapters(self) -> NDArray[np.int64]:
        return np.array([[b.adapters[r] for r in self.space.ranks] for b in self.layers], dtype=np.int64)

    def _peak(self, scope: Scope) -> PeakBytes:
        return {"storage": PeakBytes(-self.fixed_bytes), "training": self.training, "serving": self.serving}[scope]

    @cached_property
    def _tables(self) -> dict[tuple[Scope, Knob], NDArray[np.int64]]:
        tables: dict[tuple[Scope, Knob], NDArray[np.int64]] = {}
        for scope in SCOPES:
            peak = self._peak(scope)
            growth = 1.0 + peak.per_adapter_byte
            tables[scope, "bits"] = self._weights + self._metadata
            tables[scope, "rank"] = np.ceil(self._adapters * growth).astype(np.int64)
            if peak.by_rank:
                tables[scope, "rank"] += np.asarray(peak.by_rank, dtype=np.int64)
        for table in tables.values():
            table.setflags(write=False)  # shared by all who price edits
        return tables

    def table(self, scope: Scope, knob: Knob) -> NDArray[np.int64]:
        """Bytes that one knob of each layer takes at each rung, (L, rungs): what edits and repairs are priced by."""
        return self._tables[scope, knob]

    def constant_bytes(self, scope: Scope) -> int:
        """Bytes that no knob changes: so that bytes = constant + the sum of both tables' entries."""
        return self.fixed_bytes + self._peak(scope).constant

    def bytes(self, configuration: Configuration, scope: Scope = "storage") -> int:
        """Bytes of a configuration in a scope, M(C) (Eq. 5)."""
        indices = self.space.indices(configuration)
        rows = np.arange(self.space.num_layers)
        bits = self.table(scope, "bits")[rows, indices[:, 0]].sum()
        ranks = self.table(scope, "rank")[rows, indices[:, 1]].sum()
        return int(bits + ranks) + self.constant_bytes(scope)

    def footprint(self, configuration: Configuration) -> Footprint:
        """All figures of a configuration."""
        indices = self.space.indices(configuration)
        rows = np.arange(self.space.num_layers)
        return Footprint(
            weights=int(self._weights[rows, indices[:, 0]].sum()),
            metadata=int(self._metadata[rows, indices[:, 0]].sum()),
            adapters=int(self._adapters[rows, indices[:, 1]].sum()),
            fixed=self.fixed_bytes,
            training_bytes=self.bytes(configuration, "training"),
            serving_bytes=self.bytes(configuration, "serving"),
        )

    def average_bits(self, configuration: Configuration) -> float:
        """Mean bit-width over weights (not over layers)."""
        return float(np.average(configuration.bits, weights=self.parameters))

    def average_rank(self, configuration: Configuration) -> float:
        """Mean rank over layers."""
        return float(np.mean(configuration.ranks))


@dataclass(frozen=True)
class Budget:
    """The hard limit: bytes in one scope and, if wanted, a cap on the average bits over weights."""

    limit_bytes: int
    scope: Scope = "storage"
    max_average_bits: float | None = None

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise ConfigurationError(f"scope must be one of {SCOPES}, got {self.scope!r}")
        if self.limit_bytes <= 0:
            raise ConfigurationError(f"a budget must be positive, got {self.limit_bytes} bytes")

    def violation(self, memory: MemoryModel, configuration: Configuration) -> float:
        """How far a configuration is over the limits, as a fraction of them; 0 when it fits."""
        average_bits = 0.0 if self.max_average_bits is None else memory.average_bits(configuration)
        return self.excess(memory.bytes(configuration, self.scope), average_bits)

    def excess(self, size: int, average_bits: float) -> float:
        """How far so many bytes, and bits on average, are over the limits, as a fraction of them; 0 when they fit."""
        over = max(0.0, size / self.limit_bytes - 1.0)
        if self.max_average_bits is not None:
            # Rounding in the mean must not reject a configuration exactly at the cap.
            over += max(0.0, average_bits / self.max_average_bits - 1.0 - 1e-12)
        return over

    def check(self, memory: MemoryModel) -> bool:
        """Whether the budget binds anywhere; raises `InfeasibleBudgetError` when nothing fits."""
        smallest = memory.space.smallest
        if self.violation(memory, smallest) > 0:
            need = memory.bytes(smallest, self.scope)
            cap = "" if self.max_average_bits is None else f" at no more than {self.max_average_bits:g} average bits"
            raise InfeasibleBudgetError(
                f"the budget of {format_bytes(self.limit_bytes)} ({self.limit_bytes} bytes, {self.scope}{cap}) is "
                f"under the smallest configuration, {smallest}: {format_bytes(need)} ({need} bytes, "
                f"{memory.average_bits(smallest):g} average bits). Give at least that much, or lower ladders."
            )
        return self.violation(memory, memory.space.largest) > 0


def resolve_budget(
    memory: MemoryModel,
    *,
    limit: str | int | None = None,
    like: Sequence[int] | None = None,
    scope: Scope = "storage",
    max_average_bits: float | None = None,
) -> Budget:
    """Budget from one of its statements: a size with a unit, what uniform (bits, rank) takes, or only a cap on bits.

    Raises `ConfigurationError` when both or none are given, or `like` is off the ladders.
    """
    if scope not in SCOPES:
        raise ConfigurationError(f"scope must be one of {SCOPES}, got {scope!r}")
    if limit is not None and like is not None:
        raise ConfigurationError("state the budget once: either a size ('limit') or a uniform configuration ('like')")
    if like is not None:
        if len(like) != 2:
            raise ConfigurationError(f"'like' is a pair [bits, rank], as in [4, 16]; got {list(like)}")
        limit_bytes = memory.bytes(memory.space.uniform(int(like[0]), int(like[1])), scope)
    elif limit is not None:
        limit_bytes = parse_bytes(limit)
    elif max_average_bits is not None:
        limit_bytes = memory.bytes(memory.space.largest, scope)
    else:
        raise ConfigurationError(
            "no budget: give a size ('limit: 5.5GiB') or a uniform configuration ('like: [4, 16]')"
        )
    budget = Budget(limit_bytes, scope, max_average_bits)
    budget.check(memory)
    return budget
