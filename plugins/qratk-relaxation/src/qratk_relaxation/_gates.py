"""Gates: a softmax over the ladder of each knob of each layer, and what it is expected to take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from qratk import KNOBS

if TYPE_CHECKING:
    from qratk import Problem


class Gates(nn.Module):
    """Logits of bits (L, rungs) and ranks (L, rungs), all zero at first."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        super().__init__()
        shapes = [(problem.num_layers, len(problem.space.ladder(knob))) for knob in KNOBS]
        self.bits, self.rank = (nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes)

    def probabilities(self) -> tuple[Tensor, Tensor]:
        """Of the rungs, (L, rungs) each: how often a rung has the largest of logit plus Gumbel noise."""
        return self.bits.softmax(1), self.rank.softmax(1)

    def sample(self, temperature: float, generator: torch.Generator, *, hard: bool) -> tuple[Tensor, Tensor]:
        """Weights of the rungs, (L, rungs) each, by Gumbel-softmax (Jang, Gu and Poole 2017, equation 2).

        Hard ones are 0 or 1 with the gradient of the soft ones (straight-through, section 2.2).
        """
        bits, rank = (gumbel_softmax(logits, temperature, generator, hard=hard) for logits in (self.bits, self.rank))
        return bits, rank


def gumbel_softmax(logits: Tensor, temperature: float, generator: torch.Generator, *, hard: bool) -> Tensor:
    """Weights (L, rungs) of logits (L, rungs); the noise is drawn on the CPU, the same for every device."""
    uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float64)
    noise = -torch.log(-torch.log(uniform.clamp(1e-12, 1 - 1e-12)))
    soft = ((logits + noise.to(logits)) / temperature).softmax(1)
    if not hard:
        return soft
    one = nn.functional.one_hot(soft.argmax(1), soft.shape[1]).to(soft)
    return one + (soft - soft.detach())


@dataclass(frozen=True)
class Limits:
    """What the budget limits, as fractions of it: tables of bits and ranks, (L, rungs) each, and a constant."""

    bits: Tensor
    rank: Tensor
    constant: float

    def excess(self, bits: Tensor, rank: Tensor) -> Tensor:
        """Expected use over the limit as a fraction of it, a scalar; exact, for bytes add up over layers and knobs."""
        return (bits * self.bits).sum() + (rank * self.rank).sum() + (self.constant - 1.0)


def limits_of(problem: Problem, device: torch.device) -> tuple[Limits, ...]:
    """The bytes, and the cap on the average bits where there is one."""
    budget, space = problem.budget, problem.space

    def placed(table: np.ndarray) -> Tensor:
        return torch.tensor(table, dtype=torch.float64, device=device).float()

    tables = {knob: problem.table(knob) / budget.limit_bytes for knob in KNOBS}
    constant = problem.memory.constant_bytes(budget.scope) / budget.limit_bytes
    found = [Limits(placed(tables["bits"]), placed(tables["rank"]), constant)]
    if budget.max_average_bits is not None:
        share = np.asarray(problem.memory.parameters, dtype=np.float64)
        bits = np.outer(share / share.sum(), space.bits) / budget.max_average_bits
        found.append(Limits(placed(bits), placed(np.zeros_like(tables["rank"])), 0.0))
    return tuple(found)
