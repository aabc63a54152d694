"""The options of the module, checked, as one frozen value with a type for each; those that a search may vary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final, Literal, get_args

from qratk.adapters.options import AdapterOptions, StoredType
from qratk.core.checks import Checks
from qratk.core.errors import ConfigurationError
from qratk.core.evaluation import replicate_seed
from qratk.core.shared import Setting, Shared, SharedLadder
from qratk.core.text import nearest
from qratk.quantizers.base import Quantizer
from qratk.quantizers.sets import quantizer_set

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
    quantizers: Mapping[int, Specified | Quantizer] | str | None
    granularity: Literal["block", "sublayer", "fused", "linear"]
    target_modules: str | Sequence[str]
    adapter: Specified
    adalora: Mapping[str, Any] | None
    alpha_over_rank: float
    rslora: bool
    lora_dropout: float
    adapter_dtype: StoredType
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
    replicate: int | None

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
        _check_adapters(checks, self.lora_dropout, self.alpha_over_rank)
        checks.require(self.bank_dir != "", "bank_dir", self.bank_dir, "must be a folder, 'auto' or null")
        if isinstance(self.quantizers, str):
            try:
                quantizer_set(self.quantizers)
            except ConfigurationError as error:
                checks.note("quantizers", str(error))
        for bits, chosen in ({} if isinstance(self.quantizers, str) else self.quantizers or {}).items():
            named = isinstance(chosen, str | Quantizer) or (isinstance(chosen, Mapping) and "class_path" in chosen)
            checks.require(named, "quantizers", {bits: chosen}, "must be names, or {class_path, init_args}, by bits")
        checks.finish()

    @property
    def training_seed(self) -> int:
        """Seed of the first values of adapters and of dropout."""
        return replicate_seed(self.seed, self.replicate or 0)

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

    def with_shared(self, shared: Shared) -> FineTuneOptions:
        """The options with shared settings in the place of their own; raises `ConfigurationError` for others."""
        if not shared:
            return self
        for name, value in shared:
            check_shared(SharedLadder(name, (value,)))
        own: dict[str, Any] = dict(shared)
        return replace(self, **own)


_LEAST: Mapping[int, tuple[str, ...]] = {
    0: ("learning_rate", "weight_decay", "warmup_steps", "seed", "replicate"),
    1: (
        "init_batches",
        "init_batch_size",
        "schedule_steps",
        "init_iterations",
        "input_groups",
        "calibration_sequences",
    ),
}

SHAREABLE: Final[Mapping[str, str]] = {
    "alpha_over_rank": "a number",
    "init": "a name",
    "learning_rate": "a number",
    "lora_dropout": "a number",
    "replicate": "a whole number",
    "rslora": "true or false",
    "schedule": "a name",
    "warmup_steps": "a whole number",
    "weight_decay": "a number",
}
"""Options that a search may vary, and what their values are: they change neither bytes nor packed weights."""


def check_shared(ladder: SharedLadder) -> None:
    """Raise `ConfigurationError` for an option that a search cannot vary, or a value that the option cannot have."""
    kind = SHAREABLE.get(ladder.name)
    if kind is None:
        raise ConfigurationError(
            f"is no option that configurations may share; these are {', '.join(SHAREABLE)}"
            + nearest(ladder.name, SHAREABLE)
        )
    for value in ladder.values:
        if not _is(kind, value):
            raise ConfigurationError(f"must be a ladder of values that are each {kind}, got {value!r}")
        checks = Checks()
        _check_value(checks, ladder.name, value)
        checks.finish()


def _is(kind: str, value: Setting) -> bool:
    if kind in ("a name", "true or false"):
        return isinstance(value, str if kind == "a name" else bool)
    return isinstance(value, int if kind == "a whole number" else int | float) and not isinstance(value, bool)


def _check_value(checks: Checks, name: str, value: Any) -> None:
    """The checks of one option alone."""
    if name in _LEAST[0]:
        checks.at_least(0, **{name: value})
    elif name == "schedule":
        checks.require(value in get_args(Schedule), name, value, f"must be one of {', '.join(get_args(Schedule))}")
    elif name == "init":
        AdapterOptions(init=value)
    else:
        _check_adapters(checks, value if name == "lora_dropout" else 0.0, value if name == "alpha_over_rank" else 1.0)


def _check_adapters(checks: Checks, dropout: float, alpha_over_rank: float) -> None:
    checks.require(0 <= dropout < 1, "lora_dropout", dropout, "must lie in [0, 1)")
    checks.require(alpha_over_rank > 0, "alpha_over_rank", alpha_over_rank, "must be positive")
