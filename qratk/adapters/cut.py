"""Adapters that are trained wide and stored narrow: LoRA at one rank everywhere, cut to each projection's own after.

Rank acts as a learning rate: with alpha / rank constant, a larger rank is a larger step, so that adapters trained at
different ranks tell how fast they learn, and not what they can hold. PEFT's own comparison (method_comparison, Llama
3.2 3B, GSM8K) has rsLoRA of rank 64 at 52.9 %, cut to rank 32 by its singular values at 51.5 %, and trained at rank 32
at 48.2 %. Configurations that differ in ranks alone are one training, cut in several ways.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from qratk.adapters.base import AdapterMethod, Adapters, Way, adapters
from qratk.adapters.lora import Lora, LoraAdapters
from qratk.adapters.options import AdapterOptions
from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from qratk.adapters.matrices.factors import Factors
    from qratk.bank.linear import BankLinear
    from qratk.core.memory import MemoryModel

Metric = Literal["plain", "inputs"]
Allocation = Literal["projection", "block", "model"]

_A, _B = ".lora_A.weight", ".lora_B.weight"
_BLOCK = re.compile(r"\.\d+\.")
_REFUSALS: Mapping[Way, str] = {
    "side by side": "",
    "sharded": "cut adapters are decomposed whole",
    "scaled gradients": "",
}


@adapters.register("cut")
@dataclass(frozen=True)
class Cut(AdapterMethod):
    """LoRA trained at one rank, its product cut by singular values to the configured ranks before it is stored.

    Args:
        width: rank that every projection with an adapter is trained at; where a higher one is configured, that.
        metric: what an error costs: "plain" counts all inputs alike (the singular values of B A), "inputs" weighs them
            by how often they come, by the second moments of A x over a few training batches.
        batches: training batches for "inputs", of the data's size.
        allocation: what configured ranks say: the rank of each "projection", or the bytes of a transformer "block" or
            of the whole "model", which are dealt out to singular directions by squared value for each byte, never more
            of them than the ranks come to.
    """

    width: int = 16
    metric: Metric = "inputs"
    batches: int = 2
    allocation: Allocation = "projection"

    def __post_init__(self) -> None:
        if self.width < 1 or self.batches < 1:
            raise ConfigurationError(f"width and batches must be at least 1, got {self.width} and {self.batches}")
        if self.metric not in get_args(Metric) or self.allocation not in get_args(Allocation):
            raise ConfigurationError(
                f"metric must be one of {get_args(Metric)} and allocation one of {get_args(Allocation)}, got "
                f"{self.metric!r} and {self.allocation!r}"
            )

    def check(self, options: AdapterOptions) -> None:
        """Raise `ConfigurationError` for weights that are packed anew for each rank."""
        if options.init_iterations > 1:
            raise ConfigurationError(
                f"cut adapters share one training between ranks, and init_iterations={options.init_iterations} packs "
                "weights anew for each: leave it out, or train plain LoRA"
            )

    def refusal(self, way: Way) -> str:
        """Only shards are refused."""
        return _REFUSALS[way]

    @property
    def learning_rate_factor(self) -> float:
        """1."""
        return 1.0

    def trained(self, configuration: Configuration) -> Configuration:
        """The configuration with every rank over 0 raised to the width; a layer of rank 0 has no adapter here, too."""
        layers = (replace(c, rank=self.trained_rank(c.rank)) for c in configuration.layers)
        return Configuration(tuple(layers), configuration.shared)

    def trained_rank(self, rank: int) -> int:
        """Rank that is trained for one that is configured."""
        return max(rank, self.width) if rank else 0

    @property
    def shares_trainings(self) -> bool:
        """True."""
        return True

    @property
    def observed_batches(self) -> int:
        """None for the plain metric."""
        return self.batches if self.metric == "inputs" else 0

    @property
    def merges(self) -> bool:
        """True."""
        return True

    def stored_numbers(self, shape: tuple[int, int], rank: int, options: AdapterOptions) -> int:
        """As of LoRA, of the configured rank."""
        return Lora().stored_numbers(shape, rank, options)

    @property
    def traced(self) -> Cut:
        """Itself: the training step is traced at the width."""
        return self

    def training_memory(self, memory: MemoryModel) -> MemoryModel:
        """The memory model; an estimated training peak counts the adapters at the width, as a traced one does."""
        if memory.training.source == "trace":
            return memory
        ranks, each = memory.space.ranks, 1 + memory.training.per_adapter_byte
        more = tuple(
            tuple(round(each * (self.trained_rank(r) - r) * (layer.adapters[r] // r)) if r else 0 for r in ranks)
            for layer in memory.layers
        )
        return replace(memory, training=replace(memory.training, by_rank=more))

    def wrap(self, model: PreTrainedModel, banks: Mapping[str, BankLinear], options: AdapterOptions) -> CutAdapters:
        """Adapters of a model."""
        return CutAdapters(model, banks, options, method=self)

    def cut(
        self, state: Mapping[str, Tensor], ranks: Mapping[str, int], options: AdapterOptions
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """A (r, d_in) and B (d_out, r) of each projection that is left any direction, scaled as of rank r."""
        from qratk.adapters.matrices.directions import dealt, directions
        from qratk.adapters.matrices.moments import MOMENT

        by_inputs = self.metric == "inputs"
        found = {
            name: directions(value, state[name + _B], state.get(name + MOMENT) if by_inputs else None)
            for name, value in ((key.removesuffix(_A), value) for key, value in state.items() if key.endswith(_A))
        }
        pairs: dict[str, tuple[Tensor, Tensor]] = {}
        for names in _together(found, self.allocation):
            costs = [found[name].cost * options.number_bytes + options.direction_bytes for name in names]
            limit = sum(ranks[name] * cost for name, cost in zip(names, costs, strict=True))
            for name, kept in zip(names, dealt([found[name] for name in names], costs, limit), strict=True):
                if kept:
                    a, b = found[name].first(kept)
                    trained = len(state[name + _A])
                    pairs[name] = a, b * (options.scaling(trained) / options.scaling(kept))
        return pairs


def _together(names: Iterable[str], allocation: Allocation) -> list[list[str]]:
    """The projections between which directions compete."""
    groups: dict[str, list[str]] = {}
    for name in names:
        match = _BLOCK.search(name)
        block = name[: match.end()] if match else name
        key = {"projection": name, "block": block, "model": ""}[allocation]
        groups.setdefault(key, []).append(name)
    return list(groups.values())


class CutAdapters(Adapters):
    """Pairs as of LoRA at the width; what is stored is their cut, which is in their place within `stored_precision`."""

    def __init__(
        self, model: PreTrainedModel, banks: Mapping[str, BankLinear], options: AdapterOptions, *, method: Cut
    ) -> None:
        method.check(options)
        self.pairs = LoraAdapters(model, banks, options, method=method)
        self.method: Cut = method
        self.options, self.banks = options, self.pairs.banks
        self._ranks: dict[str, int] = {}
        self._moments: dict[str, Tensor] = {}
        self._is_cut = False

    @property
    def peft_model(self) -> PeftModel:
        """The model that they are in."""
        return self.pairs.peft_model

    def configure(self, options: AdapterOptions) -> None:
        """Other scaling, dropout and start from the next `reset` on."""
        self.method.check(options)
        self.options = options
        self.pairs.configure(options)

    def reset(self, name: str, rank: int, *, seed: int, factors: Factors | None = None) -> None:
        """Give a projection a fresh pair at the width, to be cut to this rank; factors are those of the width."""
        self.pairs.reset(name, self.method.trained_rank(rank), seed=seed, factors=factors)
        self._configure(name, rank)

    def outline(self, name: str, rank: int) -> None:
        """Matrices of the width without values."""
        self.pairs.outline(name, self.method.trained_rank(rank))
        self._configure(name, rank)

    def _configure(self, name: str, rank: int) -> None:
        self._ranks[name] = rank
        self._moments.pop(name, None)

    def rank(self, name: str) -> int:
        """Rank of the adapter as it would be stored."""
        with self.stored_precision():
            return self.pairs.rank(name)

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters in model order, A before B."""
        return self.pairs.parameters()

    def penalty(self) -> None:
        """None."""

    def after_steps(self, total_steps: int) -> None:
        """None."""

    def observe(self, batches: Iterable[Mapping[str, Tensor]], run: Callable[[Mapping[str, Tensor]], object]) -> None:
        """Take the second moments of A x, for x of the tokens of these batches, each of which `run` passes through."""
        self._moments = {}
        for batch in batches:
            hooks = [
                self.pairs.first(name).register_forward_hook(partial(self._take, name, batch["attention_mask"]))
                for name, rank in self._ranks.items()
                if rank
            ]
            try:
                run(batch)
            finally:
                for hook in hooks:
                    hook.remove()

    def _take(self, name: str, mask: Tensor, _: nn.Module, __: tuple[Tensor, ...], z: Tensor) -> None:
        from qratk.adapters.matrices.moments import second_moment

        moment = second_moment(z, mask)
        self._moments[name] = self._moments[name] + moment if name in self._moments else moment

    def state(self) -> dict[str, Tensor]:
        """Copies of the float32 masters by name, and of the moments, as in '....lora_A.moment'."""
        from qratk.adapters.matrices.moments import MOMENT

        moments = {name + MOMENT: moment.clone() for name, moment in self._moments.items()}
        return {**self.pairs.state(), **moments}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy masters in place, and moments where there are any; raises `ConfigurationError` as for LoRA."""
        from qratk.adapters.matrices.moments import MOMENT

        moments = {key: value for key, value in state.items() if key.endswith(MOMENT)}
        self.pairs.load({key: value for key, value in state.items() if key not in moments})
        self._moments = {
            key.removesuffix(MOMENT): value.to(self.banks[key.removesuffix(MOMENT)].device, copy=True)
            for key, value in moments.items()
        }

    def gather(self) -> None:
        """Nothing: these adapters are never sharded."""

    @contextmanager
    def stored_precision(self) -> Iterator[None]:
        """Within it there are the adapters that are stored: plain LoRA of the directions kept."""
        if self._is_cut:
            yield
            return
        from qratk.adapters.matrices.stored import stored_values

        pairs, kind = self.method.cut(self.state(), self._ranks, self.options), self.options.dtype
        rounded = {
            name: (stored_values(name + _A, a, kind).float(), stored_values(name + _B, b, kind).float())
            for name, (a, b) in pairs.items()
        }
        with self.pairs.replaced(rounded):
            self._is_cut = True
            try:
                yield
            finally:
                self._is_cut = False

    def stored_tensors(self) -> dict[str, Tensor]:
        """A and B of the directions kept, in the stored type."""
        with self.stored_precision():
            return self.pairs.stored_tensors()

    def delta(self, name: str) -> Tensor:
        """Scaling * B A of what is in place, (d_out, d_in): wide, or cut within `stored_precision`."""
        return self.pairs.delta(name)

    def peft_config(self) -> LoraConfig:
        """PEFT's configuration of the ranks that are left."""
        with self.stored_precision():
            return self.pairs.peft_config()

    def save(self, directory: str | Path) -> None:
        """Write the directions kept for plain PEFT, in the stored type."""
        with self.stored_precision():
            self.pairs.save(directory)

    def describe(self) -> dict[str, str]:
        """The precision that adapters are trained in, and how they are stored."""
        from qratk.adapters.matrices.masters import described

        return described(self.options.dtype, f"; trained at rank {self.method.width} and cut to the configured ranks")
