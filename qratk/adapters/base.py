"""The contract of adapter methods: what is trained beside frozen projections, and how it is stored and counted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from qratk.adapters.options import AdapterOptions
from qratk.core.configuration import Configuration
from qratk.registry import Registry

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from qratk.adapters.matrices.factors import Factors
    from qratk.bank.linear import BankLinear
    from qratk.core.memory import MemoryModel

Way = Literal["side by side", "sharded", "scaled gradients"]
"""How adapters may be trained: several candidates in one model, shared out over devices, under a gradient scaler."""


class AdapterMethod(ABC):
    """A way to adapt a frozen projection at a rank. Its options are plain data; `wrap` makes the adapters of a model.

    What is said here needs no model and no torch: bytes before weights are loaded, and what the method cannot do.
    """

    component_name: ClassVar[str | None] = None
    """The registered name, set by the registry."""

    @abstractmethod
    def check(self, options: AdapterOptions) -> None:
        """Raise `ConfigurationError` for options that the method cannot have: a start, or pooled inputs."""

    @abstractmethod
    def refusal(self, way: Way) -> str:
        """Why adapters cannot be trained in this way, in words; empty when they can.

        Whoever can be trained side by side is a pair of matrices as LoRA's, begun by `initial_weights`.
        """

    def trained(self, configuration: Configuration) -> Configuration:
        """The configuration that is trained for this one: itself, or one that others are trained as, too."""
        return configuration

    @property
    def shares_trainings(self) -> bool:
        """Whether `trained` may be the same for several configurations."""
        return False

    @property
    def observed_batches(self) -> int:
        """Training batches that adapters must `observe` before they are stored."""
        return 0

    def cut(
        self, state: Mapping[str, Tensor], ranks: Mapping[str, int], options: AdapterOptions
    ) -> Mapping[str, tuple[Tensor, Tensor]] | None:
        """A and B that are stored of a trained state, by projection, before rounding; None for the state as it is.

        `ranks` are those configured, by projection. Only asked of methods that can be trained side by side.
        """
        return None

    @property
    def merges(self) -> bool:
        """Whether a trained state is pairs of matrices, of the ranks of `trained`, of which several can be averaged."""
        return False

    @property
    def is_lora(self) -> bool:
        """Whether what is stored is LoRA: pairs of matrices whose product is added, with nothing besides."""
        return True

    @property
    @abstractmethod
    def learning_rate_factor(self) -> float:
        """Times the learning rate that is given for LoRA."""

    @abstractmethod
    def stored_numbers(self, shape: tuple[int, int], rank: int, options: AdapterOptions) -> int:
        """Numbers that are stored of a projection (d_out, d_in) at a rank; 0 at rank 0.

        Those beyond rank * (d_in + d_out) have 2 bytes each, the others what `options` say.
        """

    @property
    @abstractmethod
    def traced(self) -> AdapterMethod:
        """The method whose training step is traced to foretell a peak: this one, or one whose step is known to it."""

    @abstractmethod
    def training_memory(self, memory: MemoryModel) -> MemoryModel:
        """The memory model, its training peak with what is neither traced with `traced` nor in the estimate of LoRA."""

    @abstractmethod
    def wrap(self, model: PreTrainedModel, banks: Mapping[str, BankLinear], options: AdapterOptions) -> Adapters:
        """Adapters of a model, all of rank 0 once they are `reset`; the model is changed. Raises as `check` does."""


class AfterStep(ABC):
    """What follows each optimiser step, while the gradients are still there: the allocation of ranks, say."""

    @abstractmethod
    def step(self, step: int) -> None:
        """Do what follows optimiser step number `step`, from 1."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Copies on the CPU of what the next step needs, by names that no parameter has."""

    @abstractmethod
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state; entries of other things are left alone."""


class Adapters(ABC):
    """The adapters of one model: ranks, tensors, rounding, files.

    They are trained in float32 masters and stored, counted and scored in 16 bits. A projection of rank 0 has no
    adapter at all.

    Attributes:
        method: what made them.
        options: how they are scaled and stored.
        banks: the projections by qualified name, in model order.
    """

    method: AdapterMethod
    options: AdapterOptions
    banks: Mapping[str, BankLinear]

    @property
    @abstractmethod
    def peft_model(self) -> PeftModel:
        """The model that they are in."""

    # A switch

    @abstractmethod
    def configure(self, options: AdapterOptions) -> None:
        """Scale, drop and begin as other options say, from the next `reset` of each projection on.

        Stored type and pooled inputs are those that the adapters were made with.
        """

    @abstractmethod
    def reset(self, name: str, rank: int, *, seed: int, factors: Factors | None = None) -> None:
        """Give a projection a fresh adapter of this rank, seeded by (seed, name) and nested in rank, or from factors.

        The bank multiplies by the weight that the adapter is for. Parameters are new objects afterwards.
        """

    @abstractmethod
    def outline(self, name: str, rank: int) -> None:
        """Give a projection an adapter of this rank without values, on the meta device, for a trace."""

    @abstractmethod
    def rank(self, name: str) -> int:
        """Rank of a projection's adapter as it would be stored; 0 when there is none."""

    # Training

    @abstractmethod
    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters in model order, as in 'model.layers.0.mlp.up_proj.lora_A.weight'."""

    @abstractmethod
    def penalty(self) -> Tensor | None:
        """What is to be added to the loss of a step; None for nothing."""

    @abstractmethod
    def after_steps(self, total_steps: int) -> AfterStep | None:
        """What follows each step of a schedule of so many; None for nothing."""

    def observe(  # noqa: B027
        self, batches: Iterable[Mapping[str, Tensor]], run: Callable[[Mapping[str, Tensor]], object]
    ) -> None:
        """Take from passes of training batches what decides how adapters are stored; `run` passes one through."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Whole copies of the float32 masters, and of what else decides the values, by name.

        Where they are sharded, all processes must ask.
        """

    @abstractmethod
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put a state in place; raises `ConfigurationError` unless it is of this method and the active ranks."""

    @abstractmethod
    def gather(self) -> None:
        """Hold whole copies of sharded masters on the CPU, so that one process alone can save; all must call it."""

    # What is stored

    @abstractmethod
    def stored_precision(self) -> AbstractContextManager[None]:
        """Context in which the adapters have the values that are stored; the masters return afterwards."""

    @abstractmethod
    def stored_tensors(self) -> dict[str, Tensor]:
        """The adapters as they are stored and counted, by name: on the CPU, in the stored type."""

    @abstractmethod
    def delta(self, name: str) -> Tensor:
        """What an adapter adds to its projection's weight, (d_out, d_in); 0 at rank 0."""

    @abstractmethod
    def peft_config(self) -> LoraConfig:
        """PEFT's configuration of what is stored; raises `ConfigurationError` when every rank is 0."""

    @abstractmethod
    def save(self, directory: str | Path) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors` for plain PEFT, in the stored type.

        Ranks and alphas are anchored patterns, one for each projection; a pattern that matches none or not just its
        own projection is an error.
        """

    @abstractmethod
    def describe(self) -> dict[str, str]:
        """The precision in training and as stored: `trained_in`, `stored_in`, and both in words, `text`."""


adapters: Registry[AdapterMethod] = Registry("adapters", "AdapterMethod")


def check_inputs(banks: Mapping[str, BankLinear], options: AdapterOptions) -> None:
    """Raise `ConfigurationError` when the inputs of some projection do not divide into the groups asked for."""
    for name, bank in banks.items():
        options.check_inputs(name, bank.in_features)


def stored_bytes(method: AdapterMethod, options: AdapterOptions, shapes: Sequence[tuple[int, int]], rank: int) -> int:
    """Bytes of the adapters of projections (d_out, d_in) at a rank, as they are stored."""
    numbers = sum(method.stored_numbers(shape, rank, options) for shape in shapes)
    pairs = sum(rank * (d_in // options.input_group + d_out) for d_out, d_in in shapes)
    # What is no pair, such as magnitudes, has 16 bits.
    return 2 * (numbers - pairs) + options.number_bytes * pairs + options.direction_bytes * rank * len(shapes)
