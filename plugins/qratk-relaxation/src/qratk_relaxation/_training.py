"""Training of gates and adapters together, under a price on the expected bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qratk import SearchError, training_losses
from qratk_relaxation._gates import Gates, Limits, limits_of
from qratk_relaxation._mixture import Weights, gated

if TYPE_CHECKING:
    from qratk import Backbone, Problem
    from qratk_relaxation import Relaxation


class Price:
    """What exceeding the limits costs: by the method of multipliers (Hestenes 1969), or a hinge of fixed weight."""

    def __init__(self, limits: Sequence[Limits], penalty: float, *, adapt: bool) -> None:
        self.limits, self.penalty, self.adapt = tuple(limits), penalty, adapt
        self.multipliers = [0.0] * len(self.limits)

    def __call__(self, bits: Tensor, rank: Tensor) -> Tensor:
        """The price of probabilities (L, rungs) each, in nats, a scalar; a call moves the multipliers on."""
        total = bits.new_zeros(())
        for index, limit in enumerate(self.limits):
            excess = limit.excess(bits, rank)
            if not self.adapt:
                total = total + self.penalty * excess.relu()
                continue
            total = total + self.multipliers[index] * excess + 0.5 * self.penalty * excess.relu().square()
            self.multipliers[index] = max(0.0, self.multipliers[index] + self.penalty * float(excess.detach()))
        return total


def train_gates(
    options: Relaxation,
    backbone: Backbone,
    batches: Sequence[Mapping[str, Tensor]],
    problem: Problem,
    *,
    learning_rate: float,
    seed: int,
) -> dict[str, Any]:
    """Probabilities `bits` and `rank`, lists (L, rungs), after training; the `expected` use of the budget, and losses.

    `learning_rate` is that of the adapters. The model is left as it was found, and so is torch's random state. Raises
    `SearchError` when the loss diverges.
    """
    device = next(iter(backbone.banks.values())).device
    generator, weights, space = torch.Generator().manual_seed(seed), Weights(), problem.space
    placed = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]
    gates, limits = Gates(problem, device), limits_of(problem, device)
    price = Price(limits, options.penalty, adapt=options.constraint == "lagrangian")
    hard = options.estimator == "straight_through"
    warm = int(options.warmup * options.steps) if any(space.ranks) else 0
    losses: list[float] = []
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        torch.enable_grad(),
        gated(backbone, weights, space.bits, space.ranks, seed=seed) as adapters,
    ):
        _seed_dropout(seed, device)
        groups = [
            {"params": adapters, "lr": learning_rate},
            {"params": list(gates.parameters()), "lr": options.gate_learning_rate},
        ]
        optimiser = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
        for step in range(options.steps):
            drawn = gates.sample(_temperature(options, step), generator, hard=hard)
            weights.bits, weights.rank = drawn if step >= warm else (drawn[0].detach(), drawn[1].detach())
            loss = training_losses(backbone.model, placed[step % len(placed)])[0]
            losses.append(_finite(float(loss.detach()), step))
            torch.autograd.backward(loss + price(*gates.probabilities()) if step >= warm else loss)
            torch.nn.utils.clip_grad_norm_(adapters, 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
    bits, rank = (p.detach() for p in gates.probabilities())
    tail = max(1, len(losses) // 10)
    return {
        "bits": bits.double().cpu().tolist(),
        "rank": rank.double().cpu().tolist(),
        "expected": float(limits[0].excess(bits, rank)) + 1.0,
        "multipliers": price.multipliers,
        "first_loss": sum(losses[:tail]) / tail,
        "last_loss": sum(losses[-tail:]) / tail,
    }


def _seed_dropout(seed: int, device: torch.device) -> None:
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach devices whose state is not kept
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def _temperature(options: Relaxation, step: int) -> float:
    """From start to end, geometrically."""
    done = step / max(1, options.steps - 1)
    return float(options.temperature_start ** (1 - done) * options.temperature_end**done)


def _finite(loss: float, step: int) -> float:
    if not abs(loss) < float("inf"):
        raise SearchError(
            f"relaxation: the loss of the gates is {loss} at step {step}; lower adapter_learning_rate or "
            "gate_learning_rate"
        )
    return loss
