"""AdaLoRA: adapters P Lambda Q whose rank budget shrinks in training and goes where it matters (Zhang et al. 2023).

arXiv:2303.10512. Every projection begins above its rank; the singular directions that matter least, over all
projections, are pruned on a cubic schedule, until as many are left as the configuration's ranks sum to. What is left is
stored as plain LoRA: A = Q and B = P Lambda of the directions kept, with a rank of its own for each projection.

Lambda begins at 0 between small P and Q, so that AdaLoRA wants a learning rate several times LoRA's: of the embedded
model at 4 bits and rank 8, the score after 40 steps is -0.69 for LoRA at 5e-3 (-1.47 at 2e-2), and -1.34, -0.69 and
-0.33 for AdaLoRA at 5e-3, 2e-2 and 4e-2. To compare the two at one rate is unfair to it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qratk.adapters.lora import AdapterOptions, Adapters, anchored
from qratk.core.errors import ConfigurationError

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

    from qratk.adapters.starts import Factors
    from qratk.bank.linear import BankLinear
    from qratk.core.memory import MemoryModel

_ADAPTER = "default"
_STORED_BYTES = 2  # of a number
_STD = 0.02  # of P and Q at first, as in the authors' code and PEFT; Lambda begins at 0


@dataclass(frozen=True)
class AdaLoraOptions:
    """How ranks are allocated.

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

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> AdaLoraOptions:
        """Options from plain data; raises `ConfigurationError` for a name that is none."""
        known = [field.name for field in fields(cls)]
        wrong = sorted(set(given or {}) - set(known))
        if wrong:
            raise ConfigurationError(f"unknown option of adalora: {wrong[0]!r}; known are {known}")
        return cls(**(given or {}))

    def initial_rank(self, rank: int, shape: tuple[int, int]) -> int:
        """Directions that a projection of this shape begins with."""
        return max(rank, min(math.ceil(self.init_rank_factor * rank), *shape))


class SingularLinear(nn.Linear):
    """Lambda Q: Q (r, d_in) is the weight, Lambda (r,) the values."""

    def __init__(self) -> None:
        super().__init__(1, 1, bias=False, device="meta")  # its weight is given at each switch
        self.values = nn.Parameter(torch.empty(1, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        """Lambda Q x, (..., r), of x (..., d_in)."""
        return nn.functional.linear(x, self.weight) * self.values


@dataclass(frozen=True)
class Triplets:
    """The singular directions of one projection: p (d_out, r), values (r,), q (r, d_in), and which are kept, (r,)."""

    name: str
    rank: int
    p: Tensor
    values: Tensor
    q: Tensor
    kept: Tensor

    @property
    def cost(self) -> int:
        """Numbers that one direction is stored as."""
        return self.p.shape[0] + self.q.shape[1]

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """The three tensors by name."""
        yield from ((f"{self.name}.{part}", getattr(self, part)) for part in ("p", "values", "q"))

    def folded(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A = Q (k, d_in) and B = P Lambda (d_out, k) of the k directions kept, in the stored type."""
        values = self.values.detach()[self.kept]
        return self.q.detach()[self.kept].to(dtype), (self.p.detach()[:, self.kept] * values).to(dtype)


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
        adalora: AdaLoraOptions,
    ) -> None:
        if options.init != "default" or options.input_group > 1:
            raise ConfigurationError(
                f"adalora begins with P and Q of its own, on all inputs: leave out init={options.init!r} and "
                f"input_groups={options.input_groups}, or train plain LoRA"
            )
        super().__init__(model, banks, options)
        self.adalora = adalora
        self._linears = {name: (SingularLinear(), b) for name, (_, b) in self._linears.items()}
        self._kept: dict[str, Tensor] = {}

    def _pair(self, name: str) -> tuple[Any, Any]:
        """The modules of Lambda Q and of P."""
        return self._linears[name]

    def rank(self, name: str) -> int:
        """Directions that a projection has left; 0 when there is no adapter."""
        return int(self._kept[name].sum()) if name in self._kept else 0

    def reset(self, name: str, rank: int, *, seed: int, factors: Factors | None = None) -> None:
        """Give a projection fresh directions: P and Q drawn, seeded and nested in rank, Lambda zero; no factors."""
        self._kept.pop(name, None)
        if rank == 0:
            super().reset(name, 0, seed=seed)
            return
        wrapper, bank = self._wrappers[name], self.banks[name]
        a, b = self._pair(name)
        first = self.adalora.initial_rank(rank, bank.shape)
        q, p = (_normal(f"{name}.{part}", first, d, seed) for part, d in zip("QP", bank.shape[::-1], strict=True))
        a.weight, b.weight = (nn.Parameter(t.contiguous().to(bank.device)) for t in (q, p.t()))
        a.values = nn.Parameter(torch.zeros(first, device=bank.device))
        a.out_features = b.in_features = first
        wrapper.lora_A[_ADAPTER], wrapper.lora_B[_ADAPTER] = a, b
        wrapper.r[_ADAPTER], wrapper.lora_alpha[_ADAPTER] = rank, self.options.lora_alpha(rank)
        wrapper.scaling[_ADAPTER] = self.options.scaling(rank)
        self._kept[name] = torch.ones(first, dtype=torch.bool, device=bank.device)

    def triplets(self) -> list[Triplets]:
        """The directions of every projection that has an adapter, in model order; they share its memory."""
        found = []
        for name in self._wrappers:
            if name in self._kept:
                a, b = self._pair(name)
                rank = int(self._wrappers[name].r[_ADAPTER])
                found.append(Triplets(name, rank, b.weight, a.values, a.weight, self._kept[name]))
        return found

    def penalty(self) -> Tensor:
        """Weighted distance of P and Q from orthogonality, to be added to the loss.

        The mean over all matrices of ||Q Q' - 1|| and ||P' P - 1||: as the authors' code and PEFT have it; the
        paper has squares, and no mean.
        """
        triplets = self.triplets()
        with torch.autocast(triplets[0].q.device.type, enabled=False):  # a Gram matrix near 1 has no digits in 16 bits
            grams = [gram for t in triplets for gram in (t.q @ t.q.t(), t.p.t() @ t.p)]
        norms = [torch.linalg.matrix_norm(g - torch.eye(len(g), dtype=g.dtype, device=g.device)) for g in grams]
        return self.adalora.orth_reg_weight * torch.stack(norms).mean()

    def delta(self, name: str) -> Tensor:
        """What an adapter adds to its projection's weight, scaling * P Lambda Q, (d_out, d_in); 0 at rank 0."""
        if name not in self._kept:
            return super().delta(name)
        a, b = self._pair(name)
        product: Tensor = (b.weight * a.values) @ a.weight
        return product.detach() * float(self._wrappers[name].scaling[_ADAPTER])

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters in model order; Lambda is 'model.layers.0.mlp.up_proj.lora_E.weight'."""
        found = []
        for name in self._wrappers:
            if name in self._kept:
                a, b = self._pair(name)
                found += [(f"{name}.lora_A.weight", a.weight), (f"{name}.lora_B.weight", b.weight)]
                found.append((f"{name}.lora_E.weight", a.values))
        return found

    def state(self) -> dict[str, Tensor]:
        """Copies of the float32 masters by name, and of what is kept, as in '....lora_E.kept'."""
        kept = {f"{name}.lora_E.kept": kept.clone() for name, kept in self._kept.items()}
        return {**super().state(), **kept}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy masters in place, and what is kept; raises `ConfigurationError` as for LoRA."""
        own = {name: f"{name}.lora_E.kept" for name in self._kept}
        if any(key not in state or state[key].shape != self._kept[name].shape for name, key in own.items()):
            raise ConfigurationError("the adapters were not trained by adalora, or are of another configuration")
        super().load({key: value for key, value in state.items() if key not in own.values()})
        for name, key in own.items():
            self._kept[name].copy_(state[key])

    @contextmanager
    def stored_precision(self) -> Iterator[None]:
        """Within it there are the adapters that are stored: plain LoRA of the directions kept, in 16 bits.

        Before the schedule's last pruning these are more than the configured ranks, so that a score of a low rung is
        that of larger adapters.
        """
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
        config = super().peft_config()
        alphas: dict[str, Any] = {}
        root = self.options.rslora
        for triplets in self.triplets():
            if rank := self.rank(triplets.name):
                alpha = self.options.scaling(triplets.rank) * (math.sqrt(rank) if root else rank)
                alphas[anchored(triplets.name)] = alpha
        config.alpha_pattern = alphas
        return config

    def describe(self) -> dict[str, str]:
        """The precision that adapters are trained in, and how they are stored."""
        described = super().describe()
        text = f"{described['text']}; trained as P Lambda Q (AdaLoRA), stored as plain LoRA of the directions kept"
        return {**described, "text": text}


class RankAllocator:
    """Prunes the directions of all projections to a budget that depends on the step (Alg. 1 of the paper).

    With the sensitivity I = |w dL/dw| of each number w, averaged as Ī = beta1 Ī + (1 - beta1) I, and its uncertainty
    Ū = beta2 Ū + (1 - beta2) |I - Ī|, importance is Ī Ū; that of a direction is the importance of its singular value
    plus the means over its two vectors (Sec. 3.2). The budget falls from the initial to the configured number of
    directions with the cube of what is left of the schedule (Sec. 3.3). As PEFT's `RankAllocator`, but for `select`.

    Args:
        adapters: what is trained.
        total_steps: of the whole schedule, wherever a training stops.
    """

    def __init__(self, adapters: AdaLoraAdapters, total_steps: int) -> None:
        self.options = adapters.adalora
        self.triplets = adapters.triplets()
        self.first = int(self.options.tinit * total_steps)
        self.last = max(self.first + 1, total_steps - int(self.options.tfinal * total_steps))
        self._sensitivity: dict[str, Tensor] = {}
        self._uncertainty: dict[str, Tensor] = {}

    def step(self, step: int) -> None:
        """What follows optimiser step number `step`, from 1: gradients must still be there."""
        if step < self.last or (step == self.last and not self._sensitivity):
            self._observe()
        if step == self.last or (self.first < step < self.last and step % self.options.delta_t == 0):
            self._allocate(*self.budget(step))
        if step == self.last:
            self._sensitivity, self._uncertainty = {}, {}
        if step >= self.last:
            self._prune()

    def budget(self, step: int) -> tuple[int, int]:
        """Directions that are left after a step, and the stored numbers that they may be."""
        left = min(1.0, max(0.0, 1.0 - (step - self.first) / (self.last - self.first))) ** 3

        def between(begin: int, end: int) -> int:
            return int((begin - end) * left + end)

        counts = [(len(t.kept), t.rank, t.cost) for t in self.triplets]
        return (
            between(sum(n for n, _, _ in counts), sum(r for _, r, _ in counts)),
            between(sum(n * c for n, _, c in counts), sum(r * c for _, r, c in counts)),
        )

    def importance(self) -> list[Tensor]:
        """Importance of the directions of each projection, (r,)."""
        return [self._importance(triplets) for triplets in self.triplets]

    def _importance(self, triplets: Triplets) -> Tensor:
        if f"{triplets.name}.values" not in self._sensitivity:  # no token has come this way yet
            return torch.zeros_like(triplets.values)
        p, values, q = (self._sensitivity[name] * self._uncertainty[name] for name, _ in triplets.parts())
        return values + p.mean(0) + q.mean(1)

    def _observe(self) -> None:
        beta1, beta2 = self.options.beta1, self.options.beta2
        with torch.no_grad():
            for name, part in (pair for triplets in self.triplets for pair in triplets.parts()):
                if part.grad is None:
                    continue
                now = (part * part.grad).abs()
                smooth = self._sensitivity.setdefault(name, torch.zeros_like(now))
                smooth.mul_(beta1).add_(now, alpha=1 - beta1)
                uncertain = self._uncertainty.setdefault(name, torch.zeros_like(now))
                uncertain.mul_(beta2).add_((now - smooth).abs(), alpha=1 - beta2)

    def _allocate(self, directions: int, numbers: int) -> None:
        scores = torch.cat(self.importance()).double().cpu().numpy()
        sizes = [len(t.kept) for t in self.triplets]
        costs = np.repeat([t.cost for t in self.triplets], sizes)
        chosen = select(scores, costs, directions, numbers if self.options.limit_bytes else int(costs.sum()))
        for triplets, kept in zip(self.triplets, np.split(chosen, np.cumsum(sizes)[:-1]), strict=True):
            triplets.kept.copy_(torch.from_numpy(kept))
        self._prune()

    def _prune(self) -> None:
        with torch.no_grad():
            for triplets in self.triplets:
                triplets.values.masked_fill_(~triplets.kept, 0.0)

    def state(self) -> dict[str, Tensor]:
        """Copies on the CPU of what the next step needs; empty once ranks are fixed."""
        kinds = {"sensitivity": self._sensitivity, "uncertainty": self._uncertainty}
        return {
            f"adalora/{kind}/{name}": value.cpu().clone() for kind, own in kinds.items() for name, value in own.items()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state; entries of other things are left alone."""
        places = {name: part.device for triplets in self.triplets for name, part in triplets.parts()}
        for kind, own in (("sensitivity", self._sensitivity), ("uncertainty", self._uncertainty)):
            prefix = f"adalora/{kind}/"
            found = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            own.update({name: value.to(places[name], copy=True) for name, value in found.items()})


def with_importance(memory: MemoryModel, options: AdaLoraOptions) -> MemoryModel:
    """The memory model with a training peak that counts what AdaLoRA adds to LoRA's, from above.

    A number takes 24 bytes in training instead of 16 (sensitivity and uncertainty are float32 too), and projections
    begin above their rank. What is stored stays as it is: at the end there is no more than the configured ranks take.
    """
    more = max((math.ceil(options.init_rank_factor * rank) / rank for rank in memory.space.ranks if rank), default=0.0)
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


def select(scores: Sequence[float] | NDArray[Any], costs: NDArray[Any], count: int, limit: int) -> NDArray[np.bool_]:
    """Which `count` entries to keep, (N,): from the highest score down, as long as their costs can stay within a limit.

    An entry is passed over when, with it, not even the cheapest of the rest would fit; without a limit that binds these
    are the highest scores. Ties go to the first. Raises `ConfigurationError` when the cheapest `count` do not fit.
    """
    merit = np.nan_to_num(np.asarray(scores, dtype=np.float64), nan=-np.inf)
    order = np.argsort(-merit, kind="stable")
    chosen = np.zeros(len(merit), dtype=bool)
    if costs[order[:count]].sum() <= limit:
        chosen[order[:count]] = True
        return chosen
    kinds, kind = np.unique(costs, return_inverse=True)
    left = np.bincount(kind)
    if _cheapest(kinds, left, count) > limit:
        raise ConfigurationError(f"no {count} of {len(merit)} directions fit into {limit} numbers")
    for entry in order:
        if not count:
            break
        left[kind[entry]] -= 1
        if costs[entry] + _cheapest(kinds, left, count - 1) <= limit:
            chosen[entry] = True
            count, limit = count - 1, limit - int(costs[entry])
    return chosen


def _cheapest(kinds: NDArray[Any], left: NDArray[Any], count: int) -> float:
    """Least cost of `count` entries, of which there are so many `left` of each kind, cheapest first."""
    taken = np.minimum(left, np.maximum(0, count - np.concatenate([[0], np.cumsum(left)[:-1]])))
    return float((taken * kinds).sum()) if taken.sum() == count else math.inf


def _normal(name: str, rows: int, columns: int, seed: int) -> Tensor:
    # Row by row from one stream: the rows of a smaller rank are the first of a larger one's. The same on every device.
    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16], "little")
    drawn = np.random.Generator(np.random.Philox(key=key)).standard_normal((rows, columns), dtype=np.float32)
    return torch.from_numpy(drawn).mul_(_STD)
