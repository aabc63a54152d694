"""The options of the module, checked, as one frozen value with a type for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from qratk.adapters.options import AdapterOptions
from qratk.core.checks import Checks
from qratk.quantizers.base import Quantizer

Schedule = Literal["constant", "linear", "cosine"]
Specified = str | Mapping[str, Any]
"""A component by its registered name, or as {class_path, init_args}."""


@dataclass(frozen=True)
class FineTuneOptions:
    """The arguments of `FineTuneModule`, which says what they mean.

    Raises `ConfigurationError`, with all that is wrong at once.
    """

    model: str
    configuration: str | None
    quantizers: Mapping[int, Specified | Quantizer] | None
    granularity: Literal["block", "sublayer", "linear"]
    target_modules: str | Sequence[str]
    adapter: Specified
    adalora: Mapping[str, Any] | None
    alpha_over_rank: float
    rslora: bool
    lora_dropout: float
    adapter_dtype: Literal["bfloat16", "float16"]
    init: str
    init_iterations: int
    init_batches: int
    init_batch_size: int
    input_groups: int | None
    learning_rate: float
    weight_decay: float
    betas: tuple[float, float]
    warmup_steps: int
    schedule: Schedule
    schedule_steps: int | None
    compute_dtype: str
    dense_cache: bool | Literal["off", "on", "auto"]
    bank_dir: str | None
    gradient_checkpointing: bool
    trust_remote_code: bool
    tokenizer: str | None
    calibration_sequences: int
    seed: int

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> FineTuneOptions:
        """The options among the arguments of a module, which may have more of its own."""
        return cls(**{field.name: given[field.name] for field in fields(cls)})

    def __post_init__(self) -> None:
        checks = Checks()
        for least, options in _LEAST.items():
            checks.at_least(least, **{name: getattr(self, name) for name in options})
        betas = self.betas
        checks.require(len(betas) == 2 and all(0 <= b < 1 for b in betas), "betas", betas, "must be two in [0, 1)")
        checks.require(0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, "must lie in [0, 1)")
        checks.require(self.alpha_over_rank > 0, "alpha_over_rank", self.alpha_over_rank, "must be positive")
        checks.require(self.bank_dir != "", "bank_dir", self.bank_dir, "must be a folder, 'auto' or null")
        for bits, chosen in (self.quantizers or {}).items():
            named = isinstance(chosen, str | Quantizer) or (isinstance(chosen, Mapping) and "class_path" in chosen)
            checks.require(named, "quantizers", {bits: chosen}, "must be names, or {class_path, init_args}, by bits")
        checks.finish()

    @property
    def adapters(self) -> AdapterOptions:
        """How adapters are scaled, stored and begun."""
        return AdapterOptions(
            alpha_over_rank=self.alpha_over_rank,
            rslora=self.rslora,
            dropout=self.lora_dropout,
            dtype=self.adapter_dtype,
            init=self.init,
            init_iterations=self.init_iterations,
            input_groups=self.input_groups,
        )


_LEAST: Mapping[int, tuple[str, ...]] = {
    0: ("learning_rate", "weight_decay", "warmup_steps", "seed"),
    1: (
        "init_batches",
        "init_batch_size",
        "schedule_steps",
        "init_iterations",
        "input_groups",
        "calibration_sequences",
    ),
}
