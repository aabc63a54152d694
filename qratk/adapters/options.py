"""How adapters are scaled, stored and begun, whatever the method."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal, get_args

from qratk.adapters.starts.base import Start, starts
from qratk.core.errors import ConfigurationError
from qratk.core.shared import Shared

if TYPE_CHECKING:
    import torch

PLAIN = "default"
"""The start of an adapter that changes nothing at first: A random, B zero."""
StoredType = Literal["bfloat16", "float16", "int8"]
_OPTIONS: Final = {"alpha_over_rank": "alpha_over_rank", "rslora": "rslora", "lora_dropout": "dropout", "init": "init"}


@dataclass(frozen=True)
class AdapterOptions:
    """How adapters are scaled and stored.

    Args:
        alpha_over_rank: scaling of the adapters' output; constant, so that rank alone differs between layers.
        rslora: scale by `alpha` / sqrt(rank) instead (rank-stabilised LoRA).
        alpha: numerator of the scaling with `rslora`; of no effect without it.
        dropout: probability of dropping an adapter's input in training.
        dtype: type that adapters are stored, counted and scored in; they are trained in float32. "int8" has a scale for
            each direction of A and B (`qratk.adapters.matrices.stored`).
        init: "default" (A random, B zero, as PEFT), or the name of a start: "loftq", "lq_lora" and "cloq" make up for
            the quantisation error, which projections left at 16 bits have none of, so that these begin as by default;
            "eva" begins A at the directions that inputs vary most in.
        init_iterations: of quantising and approximating in turn; 1 takes the bank's own quantised weights, with more
            they are quantised anew for each rank.
        input_groups: size of the groups of inputs that are summed into one before the adapter (QA-LoRA, Xu et al.
            2023): A is (rank, d_in / input_groups). Where it is the group size of an affine quantizer, scaling * B A is
            constant within a group and can be merged into its zero points. None is no pooling.
    """

    alpha_over_rank: float = 2.0
    rslora: bool = False
    dropout: float = 0.0
    dtype: StoredType = "bfloat16"
    alpha: float = 16.0
    init: str = PLAIN
    init_iterations: int = 1
    input_groups: int | None = None

    def __post_init__(self) -> None:
        if self.init != PLAIN and self.init not in starts:
            raise ConfigurationError(f"init must be one of {(PLAIN, *starts.names())}, got {self.init!r}")
        if self.init_iterations < 1:
            raise ConfigurationError(f"init_iterations must be at least 1, got {self.init_iterations}")
        if self.input_groups is not None and self.input_groups < 1:
            raise ConfigurationError(
                f"input_groups is the size of a group of inputs, as in 32, or null; got {self.input_groups}"
            )
        if not (self.alpha_over_rank > 0 and self.alpha > 0):
            raise ConfigurationError(f"alpha must be positive, got {self.alpha_over_rank} and {self.alpha}")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigurationError(f"dropout must lie in [0, 1), got {self.dropout}")
        if self.dtype not in get_args(StoredType):
            raise ConfigurationError(f"adapters are stored in one of {get_args(StoredType)}, got {self.dtype!r}")

    def with_shared(self, shared: Shared) -> AdapterOptions:
        """The options with what shared settings of a configuration say of adapters in the place of their own."""
        own = {_OPTIONS[name]: value for name, value in shared if name in _OPTIONS}
        return replace(self, **own) if own else self  # type: ignore[arg-type]  # checked where settings are taken in

    @property
    def torch_dtype(self) -> torch.dtype:
        """The 16-bit type that holds the stored values: of "int8", what the codes stand for."""
        import torch

        dtype: torch.dtype = torch.bfloat16 if self.dtype == "int8" else getattr(torch, self.dtype)
        return dtype

    @property
    def number_bytes(self) -> int:
        """Bytes of a stored number of A and B."""
        return 1 if self.dtype == "int8" else 2

    @property
    def direction_bytes(self) -> int:
        """Bytes that a stored pair takes for each rank, beside its numbers: scales of A and B."""
        return 2 if self.dtype == "int8" else 0

    @property
    def start(self) -> Start | None:
        """What adapters begin with; None where they begin without effect."""
        return None if self.init == PLAIN else starts.create(self.init)

    @property
    def input_group(self) -> int:
        """Inputs that are summed into one; 1 when there is no pooling."""
        return self.input_groups or 1

    def check_inputs(self, name: str, d_in: int) -> None:
        """Raise `ConfigurationError` when a projection's inputs do not divide into groups."""
        if d_in % self.input_group:
            raise ConfigurationError(
                f"the {d_in} inputs of {name!r} do not divide into groups of {self.input_group}; give input_groups a "
                "divisor of every projection's inputs, or leave such projections out of target_modules"
            )

    def lora_alpha(self, rank: int) -> float:
        """PEFT's `lora_alpha` at a rank."""
        return self.alpha if self.rslora else self.alpha_over_rank * rank

    def scaling(self, rank: int) -> float:
        """Factor of the adapter's output at a rank, computed as PEFT does."""
        return self.lora_alpha(rank) / (math.sqrt(rank) if self.rslora else rank)
