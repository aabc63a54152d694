"""DoRA: a low-rank update of a weight's directions, and a trained magnitude for each of its rows (Liu et al. 2024).

arXiv:2402.09353, Eq. 5. The norm of W + scaling * B A is a constant for the gradient (Sec. 4.3); it needs the dense
weight in every forward pass, which is made and let go of there, or taken from the bank's cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qratk.adapters.base import AdapterMethod, Adapters, Way, adapters
from qratk.adapters.lora import Lora, LoraAdapters
from qratk.adapters.options import AdapterOptions
from qratk.core.errors import ConfigurationError

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from qratk.adapters.matrices.factors import Factors
    from qratk.bank.linear import BankLinear
    from qratk.core.memory import MemoryModel

_REFUSALS: Mapping[Way, str] = {
    "side by side": "DoRA takes norms of each candidate's own dense weights",
    "sharded": "DoRA takes norms of whole weights",
    "scaled gradients": "",
}
_B, _MAGNITUDE = ".lora_B.weight", ".lora_magnitude_vector"


@adapters.register("dora")
@dataclass(frozen=True)
class Dora(AdapterMethod):
    """m * (W + scaling * B A) / ||W + scaling * B A||, row by row; m begins as the norm itself."""

    def check(self, options: AdapterOptions) -> None:
        """Raise `ConfigurationError` for pooled inputs, which have no weight to take norms of in plain PEFT."""
        if options.input_group > 1:
            raise ConfigurationError(
                f"dora takes norms over all inputs: leave out input_groups={options.input_groups}, or train plain LoRA"
            )

    def refusal(self, way: Way) -> str:
        """Norms are taken of whole weights, one candidate's at a time."""
        return _REFUSALS[way]

    @property
    def is_lora(self) -> bool:
        """No: there are magnitudes besides."""
        return False

    @property
    def learning_rate_factor(self) -> float:
        """1."""
        return 1.0

    def stored_numbers(self, shape: tuple[int, int], rank: int, options: AdapterOptions) -> int:
        """Those of A and B, and a magnitude for each output."""
        return Lora().stored_numbers(shape, rank, options) + (shape[0] if rank else 0)

    @property
    def traced(self) -> Dora:
        """Itself: norms and rescaled outputs are traced. (An estimate, where no trace is made, is that of LoRA.)"""
        return self

    def training_memory(self, memory: MemoryModel) -> MemoryModel:
        """Unchanged."""
        return memory

    def wrap(self, model: PreTrainedModel, banks: Mapping[str, BankLinear], options: AdapterOptions) -> DoraAdapters:
        """Adapters of a model."""
        return DoraAdapters(model, banks, options, method=self)


@dataclass(frozen=True)
class _Forward:
    """What PEFT's layer does in the place of plain LoRA: a variant in its words."""

    bank: BankLinear

    def norms(self, a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
        """Norms of the rows of W + scaling * B A, (d_out,), of the weight in use as multiplied by in this type."""
        import torch

        bank = self.bank
        kind = "cpu" if bank.device.type == "meta" else bank.device.type  # autocast knows no meta device
        with torch.no_grad(), torch.autocast(kind, enabled=False):
            weight = bank.keyed_weight(bank.key(bank.active, bank.active_rank), dtype).to(a.dtype)
            norms: Tensor = torch.linalg.vector_norm(weight + scaling * (b @ a), dim=1)
        return norms

    def forward(self, layer: Any, *, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """The layer's output (..., d_out) from W x plus bias, `result`, and x (..., d_in)."""
        a, b = layer.lora_A[active_adapter], layer.lora_B[active_adapter]
        scaling = layer.scaling[active_adapter]
        norms = self.norms(a.weight, b.weight, scaling, result.dtype)
        scale = layer.lora_magnitude_vector[active_adapter].weight / norms
        bias = self.bank.bias
        product = result if bias is None else result - bias
        update: Tensor = b(a(layer.lora_dropout[active_adapter](x))) * scaling
        adapted: Tensor = result + (scale - 1) * product + scale * update
        return adapted


class DoraAdapters(Adapters):
    """Pairs as of LoRA, and a magnitude beside each: the variant of PEFT's layers that it calls DoRA."""

    def __init__(
        self, model: PreTrainedModel, banks: Mapping[str, BankLinear], options: AdapterOptions, *, method: Dora
    ) -> None:
        method.check(options)
        self.pairs = LoraAdapters(model, banks, options, method=method)
        self.method, self.options, self.banks = method, options, self.pairs.banks
        self._magnitudes: dict[str, nn.Parameter] = {}

    @property
    def peft_model(self) -> PeftModel:
        """The model that they are in."""
        return self.pairs.peft_model

    def configure(self, options: AdapterOptions) -> None:
        """Other scaling, dropout and start from the next `reset` on."""
        self.options = options
        self.pairs.configure(options)

    def reset(self, name: str, rank: int, *, seed: int, factors: Factors | None = None) -> None:
        """A pair as of LoRA; the magnitude is what leaves the weight as it is with that pair."""
        self.pairs.reset(name, rank, seed=seed, factors=factors)
        if rank == 0:
            self._place(name, None)
            return
        a, b = self.pairs.layers.matrices(name)
        dtype = self.peft_model.get_input_embeddings().weight.dtype
        self._place(name, _Forward(self.banks[name]).norms(a.weight, b.weight, self.pairs.layers.scaling(name), dtype))

    def outline(self, name: str, rank: int) -> None:
        """Matrices and magnitudes without values; none at rank 0."""
        import torch

        self.pairs.outline(name, rank)
        self._place(name, torch.empty(self.banks[name].out_features, device="meta") if rank else None)

    def _place(self, name: str, magnitude: Tensor | None) -> None:
        from peft.tuners.lora.dora import DoraLinearLayer
        from torch import nn

        from qratk.adapters.matrices.fused import ADAPTER

        layer = self.pairs.layers.layer(name)
        if magnitude is None:
            self._magnitudes.pop(name, None)
            layer.lora_variant.pop(ADAPTER, None)
            if ADAPTER in layer.lora_magnitude_vector:
                layer.lora_magnitude_vector.pop(ADAPTER)
            return
        holder: Any = DoraLinearLayer(fan_in_fan_out=False)  # type: ignore[no-untyped-call]
        holder.weight = self._magnitudes[name] = nn.Parameter(magnitude)
        layer.lora_magnitude_vector[ADAPTER] = holder
        layer.lora_variant[ADAPTER] = _Forward(self.banks[name])

    def rank(self, name: str) -> int:
        """Rank of a projection's pair; 0 when there is none."""
        return self.pairs.rank(name)

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters in model order: A, B and '....lora_magnitude_vector.weight'."""
        found: list[tuple[str, nn.Parameter]] = []
        for name, parameter in self.pairs.parameters():
            found.append((name, parameter))
            if name.endswith(_B):
                projection = name.removesuffix(_B)
                found.append((f"{projection}{_MAGNITUDE}.weight", self._magnitudes[projection]))
        return found

    def penalty(self) -> None:
        """None."""

    def after_steps(self, total_steps: int) -> None:
        """None."""

    def state(self) -> dict[str, Tensor]:
        """Copies of the float32 masters by name."""
        from qratk.adapters.matrices.masters import copied

        return copied(self.parameters())

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy masters in place; raises `ConfigurationError` unless names and shapes are those of the active ranks."""
        from qratk.adapters.matrices.masters import put_back

        put_back(self.parameters(), state)

    def gather(self) -> None:
        """Nothing: these adapters are never sharded."""

    def stored_precision(self) -> AbstractContextManager[None]:
        """Context in which the masters have the values that are stored; norms are those of the rounded pair."""
        from qratk.adapters.matrices.masters import rounded

        return rounded(self.parameters(), self.options.dtype)

    def stored_tensors(self) -> dict[str, Tensor]:
        """A and B in the stored type, of 8 bits codes and their scales, and magnitudes in 16 bits."""
        from qratk.adapters.matrices.stored import stored_parts

        parts = [stored_parts(name, p.detach(), self.options.dtype) for name, p in self.parameters()]
        return {name: tensor.cpu() for each in parts for name, tensor in each.items()}

    def delta(self, name: str) -> Tensor:
        """Rescaled W + scaling * B A, less W, (d_out, d_in); 0 at rank 0."""
        import torch

        bank, pair = self.banks[name], self.pairs.delta(name)
        if not self.rank(name):
            return pair
        weight = bank.dequantized(bank.active, rank=bank.active_rank)
        adapted = weight + pair
        scale = self._magnitudes[name].detach() / torch.linalg.vector_norm(adapted, dim=1)
        delta: Tensor = scale[:, None] * adapted - weight
        return delta

    def peft_config(self) -> LoraConfig:
        """PEFT's configuration of the active ranks, with `use_dora`."""
        config = self.pairs.peft_config()
        config.use_dora = True
        return config

    def save(self, directory: str | Path) -> None:
        """Write pairs and magnitudes for plain PEFT, in the stored type."""
        from qratk.adapters.matrices.layers import write
        from qratk.adapters.matrices.stored import stored_values

        config = self.peft_config()
        # PEFT's files name a magnitude without its last word.
        tensors = {n: stored_values(n, p.detach(), self.options.dtype).cpu() for n, p in self.parameters()}
        write(directory, {n.removesuffix(".weight") if _MAGNITUDE in n else n: t for n, t in tensors.items()}, config)

    def describe(self) -> dict[str, str]:
        """The precision that adapters are trained in, and that they are stored in."""
        from qratk.adapters.matrices.masters import described

        magnitudes = str(self.options.torch_dtype).removeprefix("torch.")
        return described(self.options.dtype, f"; magnitudes (DoRA) in {magnitudes}")
