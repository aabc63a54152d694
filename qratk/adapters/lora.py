"""LoRA: a product of two small matrices beside each projection (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qratk.adapters.base import AdapterMethod, Adapters, Way, adapters, check_inputs
from qratk.adapters.options import AdapterOptions

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from qratk.adapters.matrices.factors import Factors
    from qratk.bank.linear import BankLinear
    from qratk.core.memory import MemoryModel


@adapters.register("lora")
@dataclass(frozen=True)
class Lora(AdapterMethod):
    """W + scaling * B A, with A (rank, d_in) drawn and B (d_out, rank) zero at first, or both from a start."""

    def check(self, options: AdapterOptions) -> None:
        """Every option is taken."""

    def refusal(self, way: Way) -> str:
        """Nothing is refused."""
        return ""

    @property
    def learning_rate_factor(self) -> float:
        """1."""
        return 1.0

    def stored_numbers(self, shape: tuple[int, int], rank: int, options: AdapterOptions) -> int:
        """Those of A and B (Eq. 23); inputs are pooled first."""
        d_out, d_in = shape
        return rank * (d_in // options.input_group + d_out)

    @property
    def merges(self) -> bool:
        """True."""
        return True

    @property
    def traced(self) -> Lora:
        """Itself."""
        return self

    def training_memory(self, memory: MemoryModel) -> MemoryModel:
        """Unchanged."""
        return memory

    def wrap(self, model: PreTrainedModel, banks: Mapping[str, BankLinear], options: AdapterOptions) -> LoraAdapters:
        """Adapters of a model."""
        return LoraAdapters(model, banks, options, method=self)


class LoraAdapters(Adapters):
    """Pairs of matrices in PEFT's layers, which change rank in place: a switch swaps the tensors."""

    def __init__(
        self,
        model: PreTrainedModel,
        banks: Mapping[str, BankLinear],
        options: AdapterOptions,
        *,
        method: AdapterMethod | None = None,
    ) -> None:
        from qratk.adapters.matrices.layers import PeftLayers, PooledLinear

        self.method, self.options, self.banks = method or Lora(), options, dict(banks)
        check_inputs(self.banks, options)
        self.layers = PeftLayers(model, self.banks, options)
        group = options.input_group
        pairs = {name: self.layers.matrices(name) for name in self.layers}
        self._pairs: dict[str, tuple[Any, Any]] = {
            name: (a if group == 1 else PooledLinear(group), b) for name, (a, b) in pairs.items()
        }
        self._whole: dict[str, Tensor] = {}  # of sharded adapters, for one process to save

    @property
    def peft_model(self) -> PeftModel:
        """The model that they are in."""
        return self.layers.model

    def configure(self, options: AdapterOptions) -> None:
        """Other scaling, dropout and start from the next `reset` on."""
        self.options = options
        self.layers.configure(options)

    def reset(self, name: str, rank: int, *, seed: int, factors: Factors | None = None) -> None:
        """Give a projection a fresh adapter of this rank: A seeded, B zero, or both from factors."""
        from qratk.adapters.matrices.drawing import initial_weights

        bank = self.banks[name]
        if rank == 0:
            self._place(name, None)
            return
        first, second = initial_weights(name, bank.shape, rank, self.options, seed=seed, factors=factors)
        self._place(name, (first.to(bank.device), second.to(bank.device)))

    def outline(self, name: str, rank: int) -> None:
        """Matrices without values; none at rank 0."""
        import torch

        d_out, d_in = self.banks[name].shape
        a = torch.empty(rank, d_in // self.options.input_group, device="meta")
        self._place(name, (a, torch.empty(d_out, rank, device="meta")) if rank else None)

    def _place(self, name: str, matrices: tuple[Tensor, Tensor] | None) -> None:
        from torch import nn

        self._whole = {}
        if matrices is None:
            self.layers.remove(name)
            return
        a, b = self._pairs[name]
        a.weight, b.weight = (nn.Parameter(matrix) for matrix in matrices)
        self.layers.place(name, a, b, len(a.weight))

    def first(self, name: str) -> nn.Module:
        """The module that multiplies by A, the same whatever its matrix is."""
        module: nn.Module = self._pairs[name][0]
        return module

    @contextmanager
    def replaced(self, matrices: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
        """Context in which projections have these A and B, and none where none are given; the parameters return."""
        masters = {
            name: tuple(module.weight for module in self._pairs[name]) for name in self.layers if self.rank(name)
        }
        for name in masters:
            own = matrices.get(name)
            self._place(name, own and (own[0].to(self.banks[name].device), own[1].to(self.banks[name].device)))
        try:
            yield
        finally:
            for name, (first, second) in masters.items():
                a, b = self._pairs[name]
                a.weight, b.weight = first, second
                self.layers.place(name, a, b, len(first))

    def rank(self, name: str) -> int:
        """Rank of a projection's adapter; 0 when there is none."""
        return self.layers.rank(name)

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters in model order, A before B."""
        found: list[tuple[str, nn.Parameter]] = []
        for name in self.layers:
            if self.rank(name):
                a, b = self._pairs[name]
                found += [(f"{name}.lora_A.weight", a.weight), (f"{name}.lora_B.weight", b.weight)]
        return found

    def penalty(self) -> None:
        """None."""

    def after_steps(self, total_steps: int) -> None:
        """None."""

    def state(self) -> dict[str, Tensor]:
        """Whole copies of the float32 masters by name; where they are sharded, all processes must ask."""
        from qratk.adapters.matrices.masters import copied

        return copied(self.parameters())

    def gather(self) -> None:
        """Hold whole copies of sharded masters on the CPU, so that one process alone can save; all must call it."""
        from qratk.adapters.matrices.shards import is_sharded

        if any(is_sharded(parameter) for _, parameter in self.parameters()):
            self._whole = {name: value.cpu() for name, value in self.state().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy masters in place; raises `ConfigurationError` unless names and shapes are those of the active ranks."""
        from qratk.adapters.matrices.masters import put_back

        put_back(self.parameters(), state)
        self._whole = {}

    def stored_precision(self) -> AbstractContextManager[None]:
        """Context in which the masters have the values that are stored."""
        from qratk.adapters.matrices.masters import rounded

        return rounded(self.parameters(), self.options.dtype)

    def stored_tensors(self) -> dict[str, Tensor]:
        """A and B in the stored type, pooled where inputs are pooled; of 8 bits, codes and their scales."""
        from qratk.adapters.matrices.stored import stored_parts

        parts = [stored_parts(name, value, self.options.dtype) for name, value in self._masters().items()]
        return {name: tensor.cpu() for each in parts for name, tensor in each.items()}

    def stored_values(self) -> dict[str, Tensor]:
        """A and B as `stored_tensors`, in the 16-bit type that holds the stored values, on the CPU."""
        from qratk.adapters.matrices.stored import stored_values

        return {name: stored_values(name, value, self.options.dtype).cpu() for name, value in self._masters().items()}

    def _masters(self) -> Mapping[str, Tensor]:
        from qratk.adapters.matrices.shards import whole

        return self._whole or {name: whole(parameter.detach()) for name, parameter in self.parameters()}

    def delta(self, name: str) -> Tensor:
        """Scaling * B A, (d_out, d_in); 0 at rank 0."""
        import torch

        from qratk.adapters.matrices.factors import expanded

        bank = self.banks[name]
        if not self.rank(name):
            return torch.zeros(bank.shape, device=bank.device)
        a, b = self._pairs[name]
        product: Tensor = b.weight @ expanded(a.weight, self.options.input_group)
        return product.detach() * self.layers.scaling(name)

    def peft_config(self) -> LoraConfig:
        """PEFT's configuration of the active ranks."""
        return self.layers.configuration({name: self.rank(name) for name in self.layers})

    def save(self, directory: str | Path) -> None:
        """Write the pairs for plain PEFT, in the stored type.

        PEFT has no pooled inputs (but for GPTQ layers), so that a pooled A is written with its columns repeated: the
        file is then larger than what is counted.
        """
        from qratk.adapters.matrices.factors import expanded
        from qratk.adapters.matrices.layers import write

        config, group = self.peft_config(), self.options.input_group
        tensors = {n: expanded(t, group) if n.endswith("lora_A.weight") else t for n, t in self.stored_values().items()}
        write(directory, tensors, config)

    def describe(self) -> dict[str, str]:
        """The precision that adapters are trained in, and that they are stored in."""
        from qratk.adapters.matrices.masters import described

        return described(self.options.dtype)
