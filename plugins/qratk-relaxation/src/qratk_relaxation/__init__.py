"""Differentiable relaxation of bits and ranks: gates trained by gradient propose configurations."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from qratk import (
    KNOBS,
    Candidate,
    Configuration,
    ConfigurationError,
    FidelityLadder,
    GenerationSearcher,
    History,
    Problem,
    Proposer,
)

if TYPE_CHECKING:
    from qratk import EvaluationContext

__all__ = ["Relaxation"]

Array = NDArray[np.float64]

LARGEST_PRICE = 1e4  # nats for an L-th of the budget
TRIES = 20  # samples for one place of a generation; each is drawn from flatter gates than the one before


class Relaxation(GenerationSearcher):
    """Trains gates over the bits and ranks of every layer by gradient, and proposes what they favour.

    A layer multiplies by a mixture of its packed weights, sum_b p_b W_b, and the rows of its adapters pass nested rank
    gates; the gates are softmaxes, sampled with Gumbel noise at a falling temperature (Jang, Gu and Poole 2017), and
    learn beside the adapters from training batches, with a price on the expected bytes (compare Wu et al. 2018, mixed
    precision by differentiable architecture search). No full-precision weight is needed. Training happens at the first
    `ask`; its outcome is in `state`, so that a resumed search does not repeat it.

    The first candidate is the mode of the gates, repaired, and the second the likeliest configuration at the price of
    bytes at which the budget is just used up. The others are samples of the gates, drawn from flatter and flatter ones
    as the likely configurations run out. What is measured does not change the gates. Shared settings have no gates: all
    have those that did best so far.

    Args:
        offspring: candidates a generation.
        estimator: gumbel mixes weights in the forward pass; straight_through draws one of them and mixes in the
            backward pass alone.
        steps: gradient steps.
        warmup: share of them in which the adapters learn alone: rank gates see no gradient while adapters are zero.
        batches: training batches, seen again and again.
        batch_size: sequences in each; by default the data's.
        adapter_learning_rate: of AdamW, constant; by default that of fine-tuning.
        gate_learning_rate: likewise, for the gates.
        temperature_start, temperature_end: of the gates, from the first step to the last, geometrically.
        constraint: lagrangian finds the price of bytes by the method of multipliers, hinge keeps it at `penalty`
            while the expectation is over the budget.
        penalty: step of the multiplier and half the weight of the squared excess, or the hinge's weight; in nats for
            an excess of the whole budget.
    """

    def __init__(
        self,
        offspring: int = 25,
        estimator: Literal["gumbel", "straight_through"] = "gumbel",
        steps: int = 120,
        warmup: float = 0.2,
        batches: int = 16,
        batch_size: int | None = None,
        adapter_learning_rate: float | None = None,
        gate_learning_rate: float = 0.1,
        temperature_start: float = 2.0,
        temperature_end: float = 0.3,
        constraint: Literal["lagrangian", "hinge"] = "lagrangian",
        penalty: float = 1.0,
    ) -> None:
        super().__init__(offspring)
        counts = {
            "steps": steps,
            "batches": batches,
            "batch_size": 1 if batch_size is None else batch_size,
        }
        positive = {
            "adapter_learning_rate": 1.0 if adapter_learning_rate is None else adapter_learning_rate,
            "gate_learning_rate": gate_learning_rate,
            "temperature_start": temperature_start,
            "temperature_end": temperature_end,
            "penalty": penalty,
        }
        for name, value in {**counts, **positive}.items():
            if not value > 0:
                raise ConfigurationError(f"relaxation: {name} must be positive, got {value}")
        if not 0 <= warmup < 1:
            raise ConfigurationError(f"relaxation: warmup must lie in [0, 1), got {warmup}")
        if estimator not in ("gumbel", "straight_through") or constraint not in ("lagrangian", "hinge"):
            raise ConfigurationError(
                "relaxation: estimator is 'gumbel' or 'straight_through' and constraint 'lagrangian' or 'hinge', got "
                f"{estimator!r} and {constraint!r}"
            )
        self.estimator = estimator
        self.steps = steps
        self.warmup = warmup
        self.batches = batches
        self.batch_size = batch_size
        self.adapter_learning_rate = adapter_learning_rate
        self.gate_learning_rate = gate_learning_rate
        self.temperature_start = temperature_start
        self.temperature_end = temperature_end
        self.constraint = constraint
        self.penalty = penalty
        self._context: EvaluationContext | None = None
        self._gates: dict[str, Any] | None = None
        self._shared: tuple[tuple[str, Any], ...] = ()

    def attach(self, context: EvaluationContext) -> None:
        """Take the model and the data; raises `ConfigurationError` when the search has none."""
        if context.module is None or context.datamodule is None:
            raise ConfigurationError(
                "relaxation trains gates on the model itself, but this search has no model or no data: use the "
                "evaluator 'finetune', or another searcher, such as nsga2"
            )
        self._context = context

    def begin(self, proposer: Proposer, ladder: FidelityLadder) -> None:
        """Forget everything but the model."""
        super().begin(proposer, ladder)
        self._gates = None

    def proposals(
        self, history: History, rng: np.random.Generator, *, size: int, known: Collection[Configuration]
    ) -> tuple[Candidate, ...]:
        """Modes of the gates and samples of them, which results do not change; neighbours where none of that is new."""
        if self._gates is None:
            self._gates = self._trained(seed=int(rng.integers(2**31 - 1)))
        self._shared = self.leading(history)
        found: dict[Configuration, Candidate] = {}
        sources = iter((self._mode, self._priced))
        while len(found) < size:
            source = next(sources, None)
            candidate = self._sample({*known, *found}, rng) if source is None else source({*known, *found})
            if candidate is not None:
                found[candidate.configuration] = candidate
            elif source is None:
                break
        return tuple(found.values())

    def state(self) -> dict[str, Any]:
        """The generation and the outcome of the training: `bits` (L, rungs) and `rank` (L, rungs), probabilities."""
        return {**super().state(), "gates": self._gates}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        super().restore(state)
        self._gates = state["gates"]

    @property
    def gates(self) -> tuple[Array, Array]:
        """Probabilities of the rungs of bits and of ranks, each (L, rungs), once they are trained."""
        assert self._gates is not None, "ask or restore comes first"
        return np.array(self._gates["bits"]), np.array(self._gates["rank"])

    # Proposals

    def _mode(self, taken: set[Configuration]) -> Candidate | None:
        indices = np.stack([probabilities.argmax(axis=1) for probabilities in self.gates], axis=1)
        return self._repaired(indices, "relaxation:mode", taken)

    def _priced(self, taken: set[Configuration]) -> Candidate | None:
        return self._repaired(priced_mode(self.proposer.problem, *self.gates), "relaxation:priced", taken)

    def _sample(self, taken: set[Configuration], rng: np.random.Generator) -> Candidate | None:
        """A new sample of the gates, or else a neighbour of the last one; None when there is none either."""
        indices = np.zeros((self.proposer.problem.num_layers, 2), dtype=np.int64)
        for attempt in range(TRIES):
            flatness = 1.0 + 4.0 * attempt / TRIES
            indices = np.stack([_drawn(p, flatness, rng) for p in self.gates], axis=1)
            candidate = self._repaired(indices, "relaxation:sample", taken)
            if candidate is not None:
                return candidate
        last = self.proposer.repaired(self.proposer.problem.space.from_indices(indices, self._shared))
        if last is None:
            return None
        return self.proposer.propose(last, rng, known=taken, generation=self.generation)

    def _repaired(self, indices: NDArray[np.int64], origin: str, taken: set[Configuration]) -> Candidate | None:
        repaired = self.proposer.repaired(self.proposer.problem.space.from_indices(indices, self._shared))
        if repaired is None or repaired in taken:
            return None
        return Candidate(repaired, origin, generation=self.generation)

    # Training

    def _trained(self, *, seed: int) -> dict[str, Any]:
        """The gates' probabilities as plain data, and how the training went."""
        from qratk_relaxation._training import train_gates

        context = self._context
        if context is None:
            raise ConfigurationError(
                "relaxation trains gates on the model, and was not shown one: `attach` comes before `begin` and `ask`"
            )
        problem, backbone = self.proposer.problem, context.module.backbone
        _check_layers(problem, len(backbone.layers))
        backbone.build_bank(sorted({*problem.space.bits, *context.reference_bits}))
        batches = context.datamodule.calibration_batches(self.batches, self.batch_size)
        context.say(f"Training gates over bits and ranks for {self.steps} steps.")
        rate = self.adapter_learning_rate or float(context.module.options.learning_rate)
        outcome = train_gates(self, backbone, batches, problem, learning_rate=rate, seed=seed)
        context.say(
            f"The gates expect {outcome['expected']:.1%} of the budget; their loss went from "
            f"{outcome['first_loss']:.4g} to {outcome['last_loss']:.4g} nats."
        )
        return outcome


def _check_layers(problem: Problem, held: int) -> None:
    if held != problem.num_layers:
        raise ConfigurationError(
            f"relaxation: the model has {held} layers, but the search is over {problem.num_layers}: the evaluator does "
            "not measure this model; use the evaluator 'finetune', or another searcher"
        )


def priced_mode(problem: Problem, bits: Array, rank: Array) -> NDArray[np.int64]:
    """Indices (L, 2) of the configuration with the largest log-probability minus price times bytes.

    The price, found by bisection, is the lowest at which that fits the budget: below 0 where the mode leaves room.
    """

    def chosen(price: float) -> NDArray[np.int64]:
        columns = []
        for knob, probabilities in zip(KNOBS, (bits, rank), strict=True):
            share = problem.table(knob) * (problem.num_layers / problem.budget.limit_bytes)
            columns.append((np.log(np.maximum(probabilities, 1e-30)) - price * share).argmax(axis=1))
        return np.stack(columns, axis=1)

    low, high = -LARGEST_PRICE, LARGEST_PRICE
    for _ in range(60):
        middle = (low + high) / 2
        if problem.feasible(problem.space.from_indices(chosen(middle))):
            high = middle
        else:
            low = middle
    return chosen(high)


def _drawn(probabilities: Array, flatness: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """One rung a layer, (L,), drawn with probabilities (L, rungs) to the power of 1 / flatness."""
    weights = probabilities ** (1.0 / flatness)
    cumulative = np.cumsum(weights / weights.sum(axis=1, keepdims=True), axis=1)
    drawn = (rng.random((len(weights), 1)) > cumulative[:, :-1]).sum(axis=1)
    return np.asarray(drawn, dtype=np.int64)
