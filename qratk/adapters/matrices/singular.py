"""Singular directions of adapters, and which of them are kept: the tensors of AdaLoRA."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qratk.adapters.base import AfterStep
from qratk.core.errors import ConfigurationError


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


class Allocation(Protocol):
    """How ranks are allocated: options of AdaLoRA, by their names there."""

    @property
    def tinit(self) -> float:
        """As of `AdaLora`."""

    @property
    def tfinal(self) -> float:
        """As of `AdaLora`."""

    @property
    def delta_t(self) -> int:
        """As of `AdaLora`."""

    @property
    def beta1(self) -> float:
        """As of `AdaLora`."""

    @property
    def beta2(self) -> float:
        """As of `AdaLora`."""

    @property
    def limit_bytes(self) -> bool:
        """As of `AdaLora`."""


class RankAllocator(AfterStep):
    """Prunes the directions of all projections to a budget that depends on the step (Alg. 1 of the paper).

    With the sensitivity I = |w dL/dw| of each number w, averaged as Ī = beta1 Ī + (1 - beta1) I, and its uncertainty
    Ū = beta2 Ū + (1 - beta2) |I - Ī|, importance is Ī Ū; that of a direction is the importance of its singular value
    plus the means over its two vectors (Sec. 3.2). The budget falls from the initial to the configured number of
    directions with the cube of what is left of the schedule (Sec. 3.3). As PEFT's `RankAllocator`, but for `select`.

    Args:
        triplets: the directions of all projections.
        options: how ranks are allocated.
        total_steps: of the whole schedule, wherever a training stops.
    """

    def __init__(self, triplets: Sequence[Triplets], options: Allocation, total_steps: int) -> None:
        self.options = options
        self.triplets = tuple(triplets)
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
