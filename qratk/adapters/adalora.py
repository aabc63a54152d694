"""AdaLoRA: adapters P Lambda Q whose rank budget shrinks in training and goes where it matters (Zhang et al. 2023).

arXiv:2303.10512. Every projection begins above its rank; the singular directions that matter least, over all
projections, are pruned on a cubic schedule, until as many are left as the configuration's ranks sum to. What is left is
stored as plain LoRA: A = Q and B = P Lambda of the directions kept, with a rank of its own for each projection.

Lambda begins at 0 between small P and Q, so that AdaLoRA wants a learning rate several times LoRA's: of the embedded
model at 4 bits and rank 8, the score after 40 steps is -0.69 for LoRA at 5e-3 (-1.47 at 2e-2), and -1.34, -0.69 and
-0.33 for AdaLoRA at 5e-3, 2e-2 and 4e-2. To compare the two at one rate is unfair to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qratk.adapters.base import AdapterMethod, Adapters, Way, adapters, check_inputs
from qratk.adapters.lora import Lora
from qratk.adapters.options import PLAIN, AdapterOptions
from qratk.core.errors import ConfigurationError

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from qratk.adapters.matrices.factors import Factors
    from qratk.adapters.matrices.singular import RankAllocator, Triplets
    from qratk.bank.linear import BankLinear
    from qratk.core.memory import MemoryModel

_STORED_BYTES = 2  # of a number
_STD = 0.02  # of P and Q at first, as in the authors' code and PEFT; Lambda begins at 0
_REFUSALS: Mapping[Way, str] = {
    "side by side": "the ranks of AdaLoRA change while it trains",
    "sharded": "adalora compares whole adapters",
    "scaled gradients": "adalora needs gradients that are not scaled",
}


@adapters.register("adalora")
@dataclass(frozen=True)
class AdaLora(AdapterMethod):
    """P Lambda Q, from which singular directions are pruned in training until as many are left as the ranks sum to.

    Args:
        init_rank_factor: each projection begins at so many times its configured rank, rounded up: 12 for 8.
        tinit: share of all steps before the first pruning.
        tfinal: share of all steps after the last one, in which ranks are fixed.
        delta_t: steps between two allocations; what was pruned may come back at the next.
        beta1, beta2: smoothing of sensitivity and of its uncertainty.
        orth_reg_weight: weight of the penalty that keeps P and Q orthogonal.
        limit_bytes: keep the adapters' bytes, too, within what the configured ranks take. Directions of wide
            projections cost more than those of narrow ones, and the paper counts directions alone.
        learning_rate_factor: times the model's learning rate: singular values begin at 0 and the penalty holds P and Q,
            so that at LoRA's own rate AdaLoRA hardly learns (embedded model, 40 steps: -1.34 at LoRA's 5e-3, -0.69 at
            four times that, as much as LoRA reached).
    """

    init_rank_factor: float = 1.5
    tinit: float = 0.1
    tfinal: float = 0.5
    delta_t: int = 10
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    limit_bytes: bool = True
    learning_rate_factor: float = 4.0

    def __post_init__(self) -> None:
        if not self.learning_rate_factor > 0.0:
            raise ConfigurationError(f"learning_rate_factor must be positive, got {self.learning_rate_factor}")
        if not self.init_rank_factor >= 1.0:
            raise ConfigurationError(f"init_rank_factor must be at least 1, got {self.init_rank_factor}")
        if not (self.tinit >= 0.0 and self.tfinal >= 0.0 and self.tinit + self.tfinal < 1.0):
            raise ConfigurationError(
                f"tinit and tfinal are shares of all steps that leave some between them, got {self.tinit} and "
                f"{self.tfinal}"
            )
        if self.delta_t < 1:
            raise ConfigurationError(f"delta_t must be at least 1 step, got {self.delta_t}")
        if not (0.0 < self.beta1 < 1.0 and 0.0 < self.beta2 < 1.0):
            raise ConfigurationError(f"beta1 and beta2 must lie in (0, 1), got {self.beta1} and {self.beta2}")
        if not self.orth_reg_weight >= 0.0:
            raise ConfigurationError(f"orth_reg_weight must not be negative, got {self.orth_reg_weight}")

    def check(self, options: AdapterOptions) -> None:
        """Raise `ConfigurationError` for a start, for pooled inputs, and for 8 bits."""
        if options.number_bytes != _STORED_BYTES:
            raise ConfigurationError(
                f"adalora stores adapters in 16 bits, got {options.dtype!r}: give adapter_dtype=bfloat16, or train "
                "plain LoRA"
            )
        if options.init != PLAIN or options.input_group > 1:
            raise ConfigurationError(
                f"adalora begins with P and Q of its own, on all inputs: leave out init={options.init!r} and "
                f"input_groups={options.input_groups}, or train plain LoRA"
            )

    def refusal(self, way: Way) -> str:
        """All ways but the plain one are refused."""
        return _REFUSALS[way]

    def stored_numbers(self, shape: tuple[int, int], rank: int, options: AdapterOptions) -> int:
        """As of LoRA: at the end there is no more than the configured ranks take."""
        return Lora().stored_numbers(shape, rank, options)

    @property
    def traced(self) -> Lora:
        """LoRA: what P Lambda Q takes beyond that is known."""
        return Lora()

    def training_memory(self, memory: MemoryModel) -> MemoryModel:
        """The memory model with a training peak that counts what AdaLoRA adds to LoRA's, from above.

        A number takes 24 bytes in training instead of 16 (sensitivity and uncertainty are float32 too), and projections
        begin above their rank.
        """
        ranks = [rank for rank in memory.space.ranks if rank]
        more = max((math.ceil(self.init_rank_factor * rank) / rank for rank in ranks), default=0.0)
        if not more:
            return memory
        each = (24 * more - 16) / _STORED_BYTES
        training = memory.training

        def larger(rank: int, parts: Mapping[str, int]) -> dict[str, int]:
            stored = sum(layer.adapters[rank] for layer in memory.layers)
            return {**parts, "optimizer": parts.get("optimizer", 0) + math.ceil(each * stored)}

        uniform = {(bits, rank): larger(rank, parts) for (bits, rank), parts in training.uniform.items()}
        training = replace(training, per_adapter_byte=training.per_adapter_byte + each, uniform=uniform)
        return replace(memory, training=training)

    def wrap(self, model: PreTrainedModel, banks: Mapping[str, BankLinear], options: AdapterOptions) -> AdaLoraAdapters:
        """Adapters of a model."""
        return AdaLoraAdapters(model, banks, options, method=self)

    def initial_rank(self, rank: int, shape: tuple[int, int]) -> int:
        """Directions that a projection of this shape begins with."""
        return max(rank, min(math.ceil(self.init_rank_factor * rank), *shape))


class AdaLoraAdapters(Adapters):
    """Adapters in three parts, which may be trained by PEFT's own LoRA layers: Lambda is applied after Q.

    Scaling is that of the configured rank and stays so, however many directions a projection is left with.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        banks: Mapping[str, BankLinear],
        options: AdapterOptions,
        *,
        method: AdaLora,
    ) -> None:
        from qratk.adapters.matrices.layers import PeftLayers
        from qratk.adapters.matrices.singular import SingularLinear

        method.check(options)
        self.method: AdaLora = method
        self.options, self.banks = options, dict(banks)
        check_inputs(self.banks, options)
        self.layers = PeftLayers(model, self.banks, options)
        self._pairs: dict[str, tuple[Any, Any]] = {
            name: (SingularLinear(), self.layers.matrices(name)[1]) for name in self.layers
        }
        self._kept: dict[str, Tensor] = {}

    @property
    def peft_model(self) -> PeftModel:
        """The model that they are in."""
        return self.layers.model

    def _pair(self, name: str) -> tuple[Any, Any]:
        """The modules of Lambda Q and of P."""
        return self._pairs[name]

    def rank(self, name: str) -> int:
        """Directions that a projection has left; 0 when there is no adapter."""
        return int(self._kept[name].sum()) if name in self._kept else 0

    def configure(self, options: AdapterOptions) -> None:
        """Other scaling, dropout and start from the next `reset` on."""
        self.method.check(options)
        self.options = options
        self.layers.configure(options)

    def reset(self, name: str, rank: int, *, seed: int, factors: Factors | None = None) -> None:
        """Give a projection fresh directions: P and Q drawn, seeded and nested in rank, Lambda zero; no factors."""
        import torch

        from qratk.adapters.matrices.drawing import normal

        if rank == 0:
            self._remove(name)
            return
        bank = self.banks[name]
        first = self.method.initial_rank(rank, bank.shape)
        q, p = (
            normal(f"{name}.{part}", first, d, seed=seed, std=_STD)
            for part, d in zip("QP", bank.shape[::-1], strict=True)
        )
        values = torch.zeros(first, device=bank.device)
        self._place(name, rank, p.t().contiguous().to(bank.device), values, q.contiguous().to(bank.device))

    def outline(self, name: str, rank: int) -> None:
        """Directions without values; none at rank 0."""
        import torch

        if rank == 0:
            self._remove(name)
            return
        shape = self.banks[name].shape
        first = self.method.initial_rank(rank, shape)
        p, values, q = ((shape[0], first), (first,), (first, shape[1]))
        self._place(name, rank, *(torch.empty(size, device="meta") for size in (p, values, q)))

    def _remove(self, name: str) -> None:
        self._kept.pop(name, None)
        self.layers.remove(name)

    def _place(self, name: str, rank: int, p: Tensor, values: Tensor, q: Tensor) -> None:
        import torch
        from torch import nn

        a, b = self._pair(name)
        a.weight, b.weight, a.values = (nn.Parameter(tensor) for tensor in (q, p, values))
        self.layers.place(name, a, b, rank)
        self._kept[name] = torch.ones(len(values), dtype=torch.bool, device=values.device)

    def triplets(self) -> list[Triplets]:
        """The directions of every projection that has an adapter, in model order; they share its memory."""
        from qratk.adapters.matrices.singular import Triplets

        found = []
        for name in self.layers:
            if name in self._kept:
                a, b = self._pair(name)
                found.append(Triplets(name, self.layers.rank(name), b.weight, a.values, a.weight, self._kept[name]))
        return found

    def penalty(self) -> Tensor:
        """Weighted distance of P and Q from orthogonality, to be added to the loss.

        The mean over all matrices of ||Q Q' - 1|| and ||P' P - 1||: as the authors' code and PEFT have it; the
        paper has squares, and no mean.
        """
        import torch

        triplets = self.triplets()
        with torch.autocast(triplets[0].q.device.type, enabled=False):  # a Gram matrix near 1 has no digits in 16 bits
            grams = [gram for t in triplets for gram in (t.q @ t.q.t(), t.p.t() @ t.p)]
        norms = [torch.linalg.matrix_norm(g - torch.eye(len(g), dtype=g.dtype, device=g.device)) for g in grams]
        return self.method.orth_reg_weight * torch.stack(norms).mean()

    def after_steps(self, total_steps: int) -> RankAllocator:
        """The allocation of ranks."""
        from qratk.adapters.matrices.singular import RankAllocator

        return RankAllocator(self.triplets(), self.method, total_steps)

    def delta(self, name: str) -> Tensor:
        """Scaling * P Lambda Q, (d_out, d_in); 0 at rank 0."""
        import torch

        bank = self.banks[name]
        if name not in self._kept:
            return torch.zeros(bank.shape, device=bank.device)
        a, b = self._pair(name)
        product: Tensor = (b.weight * a.values) @ a.weight
        return product.detach() * self.layers.scaling(name)

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters in model order; Lambda is 'model.layers.0.mlp.up_proj.lora_E.weight'."""
        found: list[tuple[str, nn.Parameter]] = []
        for name in self.layers:
            if name in self._kept:
                a, b = self._pair(name)
                found += [(f"{name}.lora_A.weight", a.weight), (f"{name}.lora_B.weight", b.weight)]
                found.append((f"{name}.lora_E.weight", a.values))
        return found

    def state(self) -> dict[str, Tensor]:
        """Copies of the float32 masters by name, and of what is kept, as in '....lora_E.kept'."""
        from qratk.adapters.matrices.masters import copied

        kept = {f"{name}.lora_E.kept": kept.clone() for name, kept in self._kept.items()}
        return {**copied(self.parameters()), **kept}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy masters in place, and what is kept; raises `ConfigurationError` as for LoRA."""
        from qratk.adapters.matrices.masters import put_back

        own = {name: f"{name}.lora_E.kept" for name in self._kept}
        if any(key not in state or state[key].shape != self._kept[name].shape for name, key in own.items()):
            raise ConfigurationError("the adapters were not trained by adalora, or are of another configuration")
        put_back(self.parameters(), {key: value for key, value in state.items() if key not in own.values()})
        for name, key in own.items():
            self._kept[name].copy_(state[key])

    def gather(self) -> None:
        """Nothing: these adapters are never sharded."""

    @contextmanager
    def stored_precision(self) -> Iterator[None]:
        """Within it there are the adapters that are stored: plain LoRA of the directions kept, in 16 bits.

        Before the schedule's last pruning these are more than the configured ranks, so that a score of a low rung is
        that of larger adapters.
        """
        import torch
        from torch import nn

        masters, kept = {}, self._kept
        for triplets in self.triplets():
            a, b = self._pair(triplets.name)
            masters[triplets.name] = (a.weight, a.values, b.weight)
            first, second = (tensor.float() for tensor in triplets.folded(self.options.torch_dtype))
            values = torch.ones(len(first), device=first.device)
            a.weight, a.values, b.weight = (nn.Parameter(t, requires_grad=False) for t in (first, values, second))
        self._kept = {name: torch.ones_like(kept[name][kept[name]]) for name in kept}
        try:
            yield
        finally:
            self._kept = kept
            for name, (weight, values, other) in masters.items():
                a, b = self._pair(name)
                a.weight, a.values, b.weight = weight, values, other

    def stored_tensors(self) -> dict[str, Tensor]:
        """The adapters as they are stored and counted, by name: on the CPU, in the stored type, as plain LoRA."""
        tensors: dict[str, Tensor] = {}
        for triplets in self.triplets():
            if self.rank(triplets.name):
                parts = (tensor.cpu().contiguous() for tensor in triplets.folded(self.options.torch_dtype))
                tensors |= {f"{triplets.name}.lora_{side}.weight": t for side, t in zip("AB", parts, strict=True)}
        return tensors

    def peft_config(self) -> LoraConfig:
        """PEFT's configuration of the ranks that are left, scaled as in training."""
        from qratk.adapters.matrices.layers import anchored

        config = self.layers.configuration({name: self.rank(name) for name in self.layers})
        alphas: dict[str, float] = {}
        root = self.options.rslora
        for triplets in self.triplets():
            if rank := self.rank(triplets.name):
                alpha = self.options.scaling(triplets.rank) * (math.sqrt(rank) if root else rank)
                alphas[anchored(triplets.name)] = alpha
        config.alpha_pattern = alphas
        return config

    def save(self, directory: str | Path) -> None:
        """Write the directions that are left for plain PEFT, as LoRA, in the stored type."""
        from qratk.adapters.matrices.layers import write

        config = self.peft_config()
        write(directory, self.stored_tensors(), config)

    def describe(self) -> dict[str, str]:
        """The precision that adapters are trained in, and how they are stored."""
        from qratk.adapters.matrices.masters import described

        return described(
            self.options.dtype, "; trained as P Lambda Q (AdaLoRA), stored as plain LoRA of the directions kept"
        )
