"""Greedy hill climb on atomic edits, in the order that importance suggests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from qratk.core.configuration import Configuration
from qratk.core.edits import DEFAULT_EPSILON, Ledger, weights_of_layers
from qratk.core.errors import ConfigurationError
from qratk.core.evaluation import History, Request
from qratk.core.problem import Problem
from qratk.refiners._capped import CappedRefiner
from qratk.refiners.base import refiners

Move = tuple[float, int, tuple[tuple[int, int], ...]]
"""Predicted gain, bytes added, and the steps: (2 layer + column, direction) each."""


@refiners.register("hill_climb")
class HillClimb(CappedRefiner):
    """From the best measured configuration, the first neighbour that improves on it; stops where none does.

    Neighbours are one atomic edit away, or two where a step up fits only together with a step down elsewhere: at a
    tight budget no single step up fits. Where rungs differ in bytes (4 to 8 bits takes what two layers free from 4 to
    2) there are also exchanges: one step with as many others as balance it. Neighbours are tried in the order of the
    importance that they are predicted to gain, one at a time, at the highest rung; of equal ones the one with fewer
    bytes is first. Diagnostics: the gain in importance that was predicted, and the best utility so far.

    Args:
        max_evaluations: cap on evaluations at the highest rung.
        epsilon: added to the normalised importance.
    """

    origin: ClassVar[str] = "hill_climb"

    def __init__(self, max_evaluations: int = 15, epsilon: float = DEFAULT_EPSILON) -> None:
        super().__init__(max_evaluations)
        if not epsilon > 0:
            raise ConfigurationError(f"hill_climb: epsilon must be positive, got {epsilon}")
        self.epsilon = epsilon

    def ask(self, history: History, rng: np.random.Generator) -> tuple[Request, ...]:
        """The most promising neighbour that was not measured; none at a local optimum."""
        if self.finished:
            return ()
        centre, spent = self._ranked(history)[0], self._spent(history)
        near = neighbours(self._proposer.problem, centre, self.epsilon)
        found = next(((configuration, gain) for configuration, gain in near if configuration not in spent), None)
        if found is None:
            return self._finish("no neighbour improves on the best: a local optimum")
        configuration, gain = found
        self._diagnostics = {"predicted_gain": gain, "best_utility": self._utility_of(history, centre)}
        return (Request(self._candidate(configuration, centre), self._ladder.highest),)

    def state(self) -> dict[str, Any]:
        """Counter, stop reason and diagnostics; where it stands is told by the history."""
        return {**super().state(), "evaluations": self._evaluations}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        super().restore(state)
        self._evaluations = int(state["evaluations"])


def neighbours(problem: Problem, centre: Configuration, epsilon: float) -> Iterator[tuple[Configuration, float]]:
    """Feasible neighbours of a configuration and their predicted gains, the largest first, without repeats.

    A step up gains the importance of its layer and knob plus epsilon, a step down loses it (the numerators of Eq. 8 and
    9); the kinds of neighbours are those of `HillClimb`. Importance foretells nothing of shared settings: steps of
    these come before all others, with a gain of 0, for they concern every layer.
    """
    ledger = Ledger(problem, centre)
    found = [*_swaps(ledger, epsilon), *_exchanges(ledger, epsilon)]
    yield from ((configuration, 0.0) for configuration in problem.space.shared_steps(centre))
    seen = {centre}
    for gain, _, steps in sorted(found, key=lambda move: (-move[0], move[1], move[2])):
        indices = ledger.indices.copy()
        for knob, direction in steps:
            indices[divmod(knob, 2)] += direction
        configuration = problem.space.from_indices(indices, ledger.shared)
        if configuration not in seen:
            seen.add(configuration)
            yield configuration, gain


def _swaps(ledger: Ledger, epsilon: float) -> Iterator[Move]:
    """Single steps that fit, and steps up with one step down that makes room for them."""
    up, down = _Steps.of(ledger, 1, epsilon), _Steps.of(ledger, -1, epsilon)
    added = up.bytes[:, None] + down.bytes
    bits = up.weighted_bits[:, None] + down.weighted_bits
    fits = added <= -ledger.excess_bytes
    if ledger.problem.budget.max_average_bits is not None:
        fits &= bits <= -ledger.excess_weighted_bits
    fits &= up.knob[:, None] != down.knob  # neither both steps of one knob, nor no step at all
    fits[fits[:, -1], :-1] = False  # what fits alone needs no room
    for i, j in np.argwhere(fits).tolist():
        steps = tuple((int(s.knob[n]), d) for s, n, d in ((up, i, 1), (down, j, -1)) if s.knob[n] >= 0)
        yield float(up.weight[i] - down.weight[j]), int(added[i, j]), steps


def _exchanges(ledger: Ledger, epsilon: float) -> Iterator[Move]:
    """Each step up with the least important steps down that make room; each step down with the ups that fill it."""
    weights = weights_of_layers(ledger.problem, epsilon)
    for first in (1, -1):
        for knob in np.flatnonzero(ledger.possible(first)).tolist():
            trial = Ledger(ledger.problem, ledger.configuration())
            trial.step(*divmod(knob, 2), first)
            steps = ((knob, first), *_balancing(trial, weights, knob, -first))
            if len(steps) > 2 and trial.fits:
                gain = sum(direction * float(weights[divmod(k, 2)]) for k, direction in steps)
                yield gain, trial.bytes - ledger.bytes, tuple(sorted(steps))


def _balancing(trial: Ledger, weights: NDArray[np.float64], knob: int, direction: int) -> Iterator[tuple[int, int]]:
    """Steps taken of all other knobs until the configuration fits (down) or is full (up)."""
    while direction > 0 or not trial.fits:
        possible = trial.possible(direction)
        possible[divmod(knob, 2)] = False
        if direction > 0:
            possible &= trial.growth(1) <= -trial.excess_bytes
            worth = weights
        else:
            relief, excess = trial.relief()
            worth = np.minimum(relief, excess) / weights
            possible &= relief > 0
        if not possible.any():
            return
        chosen = int(np.argmax(np.where(possible, worth, -np.inf)))
        trial.step(*divmod(chosen, 2), direction)
        if direction > 0 and not trial.fits:  # the cap on the average bits
            trial.step(*divmod(chosen, 2), -1)
            return
        yield chosen, direction


@dataclass(frozen=True)
class _Steps:
    """All single steps in one direction and, last, none at all; each (n + 1,).

    `knob` is 2 layer + column, -1 for no step; `bytes` and `weighted_bits` are what a step adds.
    """

    knob: NDArray[np.int64]
    bytes: NDArray[np.int64]
    weighted_bits: NDArray[np.int64]
    weight: NDArray[np.float64]

    @classmethod
    def of(cls, ledger: Ledger, direction: int, epsilon: float) -> _Steps:
        problem = ledger.problem
        knob = np.flatnonzero(ledger.possible(direction))
        bits = np.asarray(problem.space.bits, dtype=np.int64)
        here = ledger.indices[:, 0]
        there = np.clip(here + direction, 0, len(bits) - 1)
        weighted = np.zeros(ledger.indices.shape, dtype=np.int64)
        weighted[:, 0] = np.asarray(problem.memory.parameters, dtype=np.int64) * (bits[there] - bits[here])
        return cls(
            np.append(knob, -1),
            np.append(ledger.growth(direction).ravel()[knob], 0),
            np.append(weighted.ravel()[knob], 0),
            np.append(weights_of_layers(problem, epsilon).ravel()[knob], 0.0),
        )
