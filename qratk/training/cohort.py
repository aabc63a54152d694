"""Several candidates side by side in one model: one pass over a batch trains or scores all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim import Optimizer

from qratk.adapters.base import AdapterMethod
from qratk.adapters.matrices.drawing import initial_weights
from qratk.adapters.matrices.factors import Factors, expanded, pooled
from qratk.adapters.matrices.moments import MOMENT, second_moment
from qratk.adapters.matrices.stored import stored_values
from qratk.adapters.options import AdapterOptions
from qratk.bank.linear import VariantKey
from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError

if TYPE_CHECKING:
    from peft import PeftModel

    from qratk.backbone.backbone import Backbone
    from qratk.backbone.layers import TargetLayer
    from qratk.bank.linear import BankLinear

Runs = tuple[tuple[VariantKey, tuple[tuple[int, int], ...]], ...]
"""Packed weights in use at a projection, each with the runs [first, last) of candidates that use it."""
FactorsOf = Callable[[str, int, int, str], Factors | None]
"""First values of the adapter of a projection at some bits and rank, by a start; None for those by default."""


class CohortMatmul(torch.autograd.Function):
    """Quantised product plus low-rank update of K candidates: W_k x + s_k B_k A_k x, with everything but W learnt.

    One multiplication for each run of neighbours with equal bits, two batched ones for the adapters. Kept for the
    backward pass: x and A x. No dense weight is (it is made again, or taken from the bank's cache).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, mask: Tensor | None, layer: CohortLinear) -> Tensor:
        """Product (K, N, d_out) of x (K, N, d_in) with a (K, R, d_in), b (K, d_out, R) and mask (1, N, d_in).

        Where inputs are pooled, a is (K, R, d_in / group).
        """
        out = layer.frozen_product(x)
        dropped = pooled(x if mask is None else x * mask, layer.group)
        kind = _multiplied_in(x, a)
        low = torch.bmm(dropped.to(kind), a.to(kind).transpose(1, 2))  # (K, N, R)
        if out.dtype == kind and a.dtype == torch.float32:
            scaled = low if layer.scaling_tensor is None else low * layer.scaling_tensor.to(kind)
            out.baddbmm_(scaled, b.to(kind).transpose(1, 2), alpha=layer.scaling)
        else:  # rounded where a candidate alone is
            factor = layer.scaling if layer.scaling_tensor is None else layer.scaling_tensor
            out = torch.bmm(low, b.transpose(1, 2)).mul_(factor).add_(out).to(out.dtype)
        ctx.layer = layer
        ctx.save_for_backward(x, a, b, low, *(() if mask is None else (mask,)))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        """Gradients of x, a and b."""
        x, a, b, low, *masks = ctx.saved_tensors
        layer: CohortLinear = ctx.layer
        grad = grad.contiguous()
        dropped = pooled(x * masks[0] if masks else x, layer.group)
        kind = low.dtype
        outer = grad.to(kind)
        grad_b = torch.bmm(outer.transpose(1, 2), low)  # (K, d_out, R)
        grad_low = torch.bmm(outer, b.to(kind))  # (K, N, R)
        for value in (grad_b, grad_low):
            value.mul_(layer.scaling)
            if layer.scaling_tensor is not None:
                value.mul_(layer.scaling_tensor)
        grad_a = torch.bmm(grad_low.transpose(1, 2), dropped.to(kind)).to(a.dtype)
        grad_b = grad_b.to(b.dtype)
        if not ctx.needs_input_grad[0]:
            return None, grad_a, grad_b, None, None
        grad_x = layer.frozen_gradient(grad)
        a = expanded(a, layer.group).to(kind)
        if masks:
            grad_x = grad_x + torch.bmm(grad_low, a).to(grad_x.dtype).mul_(masks[0])
        elif grad_x.dtype == a.dtype:
            grad_x.baddbmm_(grad_low, a)
        else:
            grad_x = (torch.bmm(grad_low, a) + grad_x).to(grad_x.dtype)
        return grad_x, grad_a, grad_b, None, None


def _multiplied_in(x: Tensor, adapter: Tensor) -> torch.dtype:
    """Type of an adapter's products: that of bfloat16 inputs on the CPU, as of a candidate alone, else its own."""
    return x.dtype if x.dtype == torch.bfloat16 and x.device.type == "cpu" else adapter.dtype


class FrozenMatmul(torch.autograd.Function):
    """The quantised product alone, where no candidate has an adapter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: CohortLinear) -> Tensor:
        """Product (K, N, d_out) of x (K, N, d_in)."""
        ctx.layer = layer
        return layer.frozen_product(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        """Gradient of x."""
        return (ctx.layer.frozen_gradient(grad.contiguous()) if ctx.needs_input_grad[0] else None), None


class CohortLinear(nn.Module):
    """A projection of K candidates: rows k*B to (k+1)*B of its input belong to candidate k.

    Adapters are zero-padded to the largest rank R of the projection: gradients of the padding are zero, so that it
    stays zero under AdamW.

    Args:
        name: of the projection; it seeds the adapters.
        bank: its packed weights.
        bits, ranks: of the K candidates.
        options: how the adapters of each are scaled and begun; their dropout is the same.
        seed: of the adapters, as when a candidate is trained alone.
        factors: first values of the adapter at some bits and rank, where they are not those by default.
    """

    def __init__(
        self,
        name: str,
        bank: BankLinear,
        bits: Sequence[int],
        ranks: Sequence[int],
        options: Sequence[AdapterOptions],
        *,
        seed: int,
        factors: FactorsOf,
    ) -> None:
        super().__init__()
        self._bank = (bank,)  # not a submodule: the bank belongs to the backbone
        self.ranks, self.dropout = tuple(ranks), options[0].dropout
        self.group = options[0].input_group
        self.runs = _runs([bank.key(b, r) for b, r in zip(bits, ranks, strict=True)])
        self.observed: Tensor | None = None  # (B, T), of the batch whose moments are taken
        self.moments: Tensor | None = None  # (K, R, R), of A x
        self.lora_a: nn.Parameter | None = None
        self.lora_b: nn.Parameter | None = None
        values = [own.scaling(r) if r else 0.0 for own, r in zip(options, ranks, strict=True)]
        scalings = {value for value, r in zip(values, ranks, strict=True) if r}
        self.scaling = scalings.pop() if len(scalings) == 1 else 1.0
        self.scaling_tensor: Tensor | None = None  # (K, 1, 1), where it is not the same for all
        if scalings:
            self.scaling_tensor = torch.tensor(values, device=bank.device).reshape(-1, 1, 1)
        widest = max(ranks)
        if widest == 0:
            return
        a = torch.zeros(len(ranks), widest, bank.in_features // self.group)
        b = torch.zeros(len(ranks), bank.out_features, widest)
        for index, (width, rank, own) in enumerate(zip(bits, ranks, options, strict=True)):
            if rank:
                begin = factors(name, width, rank, own.init)
                first = initial_weights(name, bank.shape, rank, own, seed=seed, factors=begin)
                a[index, :rank], b[index, :, :rank] = first
        self.lora_a, self.lora_b = nn.Parameter(a.to(bank.device)), nn.Parameter(b.to(bank.device))

    @property
    def bank(self) -> BankLinear:
        """The packed weights."""
        return self._bank[0]

    def put_moment(self, member: int, moment: Tensor) -> None:
        """Keep the moments (r, r) of one candidate."""
        if self.moments is None:
            rank = max(self.ranks)
            self.moments = torch.zeros(len(self.ranks), rank, rank, device=self.bank.device)
        self.moments[member, : len(moment), : len(moment)] = moment

    @property
    def weight(self) -> Tensor:
        """As of the bank: for code that asks for its device or dtype."""
        return self.bank.weight

    @property
    def bias(self) -> Tensor | None:
        """As of the bank."""
        return self.bank.bias

    def forward(self, x: Tensor) -> Tensor:
        """Product (K*B, ..., d_out) of x (K*B, ..., d_in), in the dtype of x or of autocast, which adapters follow."""
        device = x.device.type
        mixed = torch.is_autocast_enabled(device)
        if mixed:
            x = x.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            stacked = x.reshape(len(self.ranks), -1, x.shape[-1])
            if self.lora_a is None or self.lora_b is None:
                out: Tensor = FrozenMatmul.apply(stacked, self)  # type: ignore[no-untyped-call]
            else:
                if self.observed is not None:
                    self._observe(stacked, self.lora_a, self.observed)
                function: Any = CohortMatmul
                a, b = (p.to(x.dtype) if mixed else p for p in (self.lora_a, self.lora_b))
                out = function.apply(stacked, a, b, self._dropped(x), self)
        return out.reshape(*x.shape[:-1], -1)

    @torch.no_grad()
    def _observe(self, x: Tensor, a: Tensor, mask: Tensor) -> None:
        moment = second_moment(torch.bmm(pooled(x, self.group).to(a.dtype), a.transpose(1, 2)), mask)
        self.moments = moment if self.moments is None else self.moments + moment

    def _dropped(self, x: Tensor) -> Tensor | None:
        # One mask for all, drawn as a candidate alone would draw it.
        if not (self.training and self.dropout):
            return None
        one = torch.ones(x.shape[0] // len(self.ranks), *x.shape[1:], device=x.device, dtype=x.dtype)
        return nn.functional.dropout(one, self.dropout).reshape(1, -1, x.shape[-1])

    def frozen_product(self, x: Tensor) -> Tensor:
        """W_k x plus bias, (K, N, d_out), of x (K, N, d_in)."""
        bank = self.bank
        out = x.new_empty(*x.shape[:2], bank.out_features)
        for key, runs in self.runs:
            weight = bank.keyed_weight(key, x.dtype).t()
            for first, last in runs:
                torch.mm(x[first:last].flatten(0, 1), weight, out=out[first:last].flatten(0, 1))
        return out if bank.bias is None else out.add_(bank.bias.to(x.dtype))

    def frozen_gradient(self, grad: Tensor) -> Tensor:
        """Gradient of x (K, N, d_in) through W_k alone, from that of the product, (K, N, d_out)."""
        bank = self.bank
        out = grad.new_empty(*grad.shape[:2], bank.in_features)
        for key, runs in self.runs:
            weight = bank.keyed_weight(key, grad.dtype)
            for first, last in runs:
                torch.mm(grad[first:last].flatten(0, 1), weight, out=out[first:last].flatten(0, 1))
        return out


def _runs(keys: Sequence[VariantKey]) -> Runs:
    found: dict[VariantKey, list[tuple[int, int]]] = {}
    for key, members in groupby(range(len(keys)), key=lambda k: keys[k]):
        run = list(members)
        found.setdefault(key, []).append((run[0], run[-1] + 1))
    return tuple((key, tuple(found[key])) for key in sorted(found, key=lambda k: k if isinstance(k, tuple) else (k, 0)))


class Cohort:
    """K candidates that are put into a model side by side, while it is `installed`.

    Inputs of the model are then batches of K*B rows, candidate after candidate. What is trained is the same as when
    each candidate is trained alone: the same nested initial adapters, the same arithmetic but for the order of
    additions.

    Args:
        model: the PEFT model that holds the projections.
        layers: the searched layers, whose bank must hold all bit-widths in use.
        options: how the adapters of each candidate are scaled, begun and stored; raises `ConfigurationError` where
            their dropout differs, whose draws are common to all.
        configurations: of the K candidates.
        seed: of the adapters.
        factors: first values of an adapter, where they are not those by default.
        method: of the adapters; it says what is trained for a configuration, and how that is cut.
    """

    def __init__(
        self,
        model: PeftModel,
        layers: Sequence[TargetLayer],
        options: Sequence[AdapterOptions],
        configurations: Sequence[Configuration],
        *,
        seed: int,
        factors: FactorsOf,
        method: AdapterMethod,
    ) -> None:
        if not configurations:
            raise ConfigurationError("a cohort needs at least one configuration")
        dropouts = sorted({own.dropout for own in options})
        if len(dropouts) > 1:
            raise ConfigurationError(f"candidates side by side need the same lora_dropout, got {dropouts}")
        self.dropout = dropouts[0]
        self.configurations = tuple(configurations)
        self._model, self._options, self._method = model, tuple(options), method
        self._linears: dict[str, CohortLinear] = {}
        self._stored_ranks: dict[str, tuple[int, ...]] = {}
        trained = [self._method.trained(configuration) for configuration in configurations]
        for index, layer in enumerate(layers):
            choices = [configuration.layers[index] for configuration in trained]
            bits, ranks = [choice.bits for choice in choices], [choice.rank for choice in choices]
            for name, bank in layer.modules:
                self._stored_ranks[name] = tuple(c.layers[index].rank for c in configurations)
                for width in set(bits):
                    bank.require(width)
                self._linears[name] = CohortLinear(name, bank, bits, ranks, options, seed=seed, factors=factors)

    @classmethod
    def of(cls, backbone: Backbone, configurations: Sequence[Configuration], *, seed: int) -> Cohort:
        """Candidates of a backbone, with fresh adapters seeded as its `activate` does; raises as that does.

        Raises `ConfigurationError` for adapters that cannot be trained side by side.
        """
        adapters = backbone.adapters
        if refusal := adapters.method.refusal("side by side"):
            raise ConfigurationError(f"{refusal}: candidates are trained one by one")
        backbone.prepare(configurations)
        options = [backbone.adapter_options(configuration) for configuration in configurations]

        def factors(name: str, bits: int, rank: int, init: str) -> Factors | None:
            return backbone.initial_factors(name, bits, rank, init=init)

        return cls(
            backbone.model,
            backbone.layers,
            options,
            configurations,
            seed=seed,
            factors=factors,
            method=adapters.method,
        )

    def __len__(self) -> int:
        return len(self.configurations)

    @contextmanager
    def installed(self) -> Iterator[nn.Module]:
        """The model with this cohort in it; as before afterwards."""
        base = self._model.get_base_model()
        training = self._model.training
        before = {name: base.get_submodule(name) for name in self._linears}
        for name, linear in self._linears.items():
            _put(base, name, linear.train(training))
        try:
            yield self._model
        finally:
            for name, module in before.items():
                _put(base, name, module)

    # The adapters

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Names and stacked parameters, (K, R, d_in) and (K, d_out, R), in model order."""
        found: list[tuple[str, nn.Parameter]] = []
        for name, linear in self._linears.items():
            if linear.lora_a is not None and linear.lora_b is not None:
                found += [(f"{name}.lora_A.weight", linear.lora_a), (f"{name}.lora_B.weight", linear.lora_b)]
        return found

    def state(self, member: int) -> dict[str, Tensor]:
        """Copies of one candidate's float32 masters, named and shaped as `Backbone.adapter_state` has them."""
        return {name: value.clone() for name, value in self._views(member).items()}

    def load_state(self, member: int, state: Mapping[str, Tensor]) -> None:
        """Put one candidate's masters in place; raises `ConfigurationError` when they are of another configuration."""
        own = self._own(member)
        moments = {name.removesuffix(MOMENT): value for name, value in state.items() if name.endswith(MOMENT)}
        if {name for name, _ in own} != {name for name in state if not name.endswith(MOMENT)}:
            raise ConfigurationError(f"the adapters are not of configuration {self.configurations[member]}")
        with torch.no_grad():
            for name, parameter in own:
                self._part(name, parameter, member).copy_(state[name])
        for name, value in moments.items():
            self._linears[name].put_moment(member, value)

    def moments(self, optimizer: Optimizer, member: int) -> dict[str, Tensor]:
        """One candidate's share of AdamW's state, on the CPU, as `<parameter>/<moment>`."""
        found = {}
        for name, parameter in self._own(member):
            for key, value in optimizer.state.get(parameter, {}).items():
                part = self._part(name, value, member) if value.dim() else value
                found[f"{name}/{key}"] = part.detach().cpu().clone()
        return found

    def load_moments(self, optimizer: Optimizer, moments: Sequence[Mapping[str, Tensor]]) -> None:
        """Put AdamW's state of all candidates in place; they must have done the same number of steps."""
        for member, own in enumerate(moments):
            for name, parameter in self._own(member):
                state = optimizer.state[parameter]
                for key in sorted(k.rsplit("/", 1)[1] for k in own if k.rsplit("/", 1)[0] == name):
                    value = own[f"{name}/{key}"]
                    if not value.dim():
                        state[key] = value.clone()
                        continue
                    if key not in state:
                        state[key] = torch.zeros_like(parameter)
                    self._part(name, state[key], member).copy_(value)

    def observe(self, batches: Iterable[Mapping[str, Tensor]], run: Callable[[Mapping[str, Tensor]], object]) -> None:
        """Take what decides how the adapters are stored; `run` passes a batch through, for all candidates."""
        for linear in self._linears.values():
            linear.moments = None
        for batch in batches:
            for linear in self._linears.values():
                linear.observed = batch["attention_mask"]
            try:
                run(batch)
            finally:
                for linear in self._linears.values():
                    linear.observed = None

    def _views(self, member: int) -> dict[str, Tensor]:
        found = {name: self._part(name, p, member).detach() for name, p in self._own(member)}
        for name, linear in self._linears.items():
            if linear.moments is not None and (rank := linear.ranks[member]):
                found[name + MOMENT] = linear.moments[member, :rank, :rank]
        return found

    def _own(self, member: int) -> list[tuple[str, nn.Parameter]]:
        # The parameters in which a candidate has a part: none where its rank is 0.
        return [(n, p) for n, p in self.parameters() if self._linears[_projection(n)].ranks[member]]

    def _part(self, name: str, stacked: Tensor, member: int) -> Tensor:
        rank = self._linears[_projection(name)].ranks[member]
        return stacked[member, :rank] if name.endswith("lora_A.weight") else stacked[member, :, :rank]

    @contextmanager
    def stored_precision(self) -> Iterator[None]:
        """Within it the adapters have the values that are stored; the masters return afterwards."""
        kind = self._options[0].dtype
        masters = [(name, parameter, parameter.data) for name, parameter in self.parameters()]
        cuts = [self._cut(member) for member in range(len(self))]
        for name, parameter, master in masters:
            parameter.data = stored_values(name, master, kind).to(master.dtype)
        for member, cut in enumerate(cuts):
            if cut is not None:
                self._put_cut(member, cut)
        try:
            yield
        finally:
            for _, parameter, master in masters:
                parameter.data = master

    def _cut(self, member: int) -> Mapping[str, tuple[Tensor, Tensor]] | None:
        ranks = {name: stored[member] for name, stored in self._stored_ranks.items()}
        return self._method.cut(self._views(member), ranks, self._options[member])

    @torch.no_grad()
    def _put_cut(self, member: int, cut: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Put what is stored of a candidate in the place of its masters, with zeros for what is cut away."""
        kind, scaling = self._options[member].dtype, self._options[member].scaling
        for name, linear in self._linears.items():
            if linear.lora_a is None or linear.lora_b is None:
                continue
            linear.lora_a[member] = 0.0
            linear.lora_b[member] = 0.0
            if name in cut:
                sides = zip(cut[name], ("lora_A.weight", "lora_B.weight"), strict=True)
                a, b = (stored_values(side, tensor, kind).to(linear.lora_a) for tensor, side in sides)
                rank = len(a)
                linear.lora_a[member, :rank] = a
                linear.lora_b[member, :, :rank] = b * (scaling(rank) / scaling(linear.ranks[member]))

    @torch.no_grad()
    def clip_gradients(self, limit: float, algorithm: str = "norm") -> None:
        """Clip the gradients of each candidate by itself: by their joint norm, as torch does, or by value."""
        grads = [p.grad for _, p in self.parameters() if p.grad is not None]
        if algorithm == "value":
            for grad in grads:
                grad.clamp_(-limit, limit)
            return
        norms = torch.stack([torch.linalg.vector_norm(grad, dim=(1, 2)) for grad in grads])  # (tensors, K)
        factor = (limit / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)
        for grad in grads:
            grad.mul_(factor.reshape(-1, 1, 1))


def _projection(parameter: str) -> str:
    return parameter.rsplit(".", 2)[0]


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)
