"""The configuration of largest additive value within the budget: a multiple-choice knapsack, solved by HiGHS."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError, InfeasibleBudgetError
from qratk.core.problem import Problem
from qratk.core.shared import Shared
from qratk.programs.binary import least_binary

Array = NDArray[np.float64]

LARGEST = 50_000
SLACK = 2e-6


def best_choice(
    problem: Problem, values: Array, *, shared: Shared | None = None, gap: float = 1e-4, exact: bool = True
) -> Configuration:
    """Configuration with the largest sum over layers of `values[l, bits, rank]` that fits the budget.

    A multiple-choice knapsack (Kellerer, Pferschy and Pisinger 2004, chapter 11): one binary a layer and choice, one
    choice a layer, bytes and weighted bits under their limits. Measured: 10 ms for 32 layers of 9 choices. Where the
    solver finds nothing, and over `LARGEST` binaries, the greedy choice stands in.

    Args:
        problem: space, bytes and budget.
        values: worth of each choice by layer, rung of bits and rung of rank, (L, bits, ranks); -inf forbids a choice.
        shared: settings of the configuration; by default the middle ones.
        gap: relative gap at which the solver stops; values are measured from the least of each layer.
        exact: ask the solver; the greedy choice alone falls short by .1 to .3 % of the range of values (mean of 8
            problems of 12, 32 and 80 layers, worst 1.3 %), at a thirtieth of the time.

    Raises `InfeasibleBudgetError` when no allowed configuration fits.
    """
    shared = problem.space.middle if shared is None else shared
    choices = _Choices.of(problem, values)
    solved = _solved(choices, gap) if exact and choices.layer.size <= LARGEST else None
    greedy = greedy_choice(choices) if solved is None else None
    taken = greedy if solved is None else solved
    if taken is None:
        raise InfeasibleBudgetError(
            f"no allowed configuration fits {problem.budget.limit_bytes} bytes ({problem.budget.scope}); "
            "allow lower rungs or raise the budget"
        )
    return choices.configuration(taken, shared)


@dataclass(frozen=True)
class _Choices:
    """The allowed choices of all layers in one row, n in all, sorted by layer.

    `layer`, `bits` and `rank` (indices of rungs), `value`, `bytes` and `weighted_bits` are each (n,); `limits` are
    those of bytes and weighted bits, the latter infinite without a cap on the average.
    """

    problem: Problem
    layer: NDArray[np.int64]
    bits: NDArray[np.int64]
    rank: NDArray[np.int64]
    value: Array
    bytes: NDArray[np.int64]
    weighted_bits: NDArray[np.int64]
    limits: tuple[float, float]

    @classmethod
    def of(cls, problem: Problem, values: Array) -> _Choices:
        space, budget = problem.space, problem.budget
        shape = (space.num_layers, len(space.bits), len(space.ranks))
        values = np.asarray(values, dtype=np.float64)
        allowed = values > -np.inf
        if values.shape != shape or np.isnan(values).any() or not allowed.any(axis=(1, 2)).all():
            raise ConfigurationError(
                f"values of choices must be numbers of shape {shape}, one over -inf in every layer; got {values.shape}"
            )
        layer, bits, rank = np.nonzero(allowed)
        parameters = np.asarray(problem.memory.parameters, dtype=np.int64)
        cap = np.inf
        if budget.max_average_bits is not None:  # the tolerance of `Budget.violation`
            cap = float(parameters.sum()) * budget.max_average_bits * (1 + 1e-12)
        return cls(
            problem,
            layer,
            bits,
            rank,
            values[allowed],
            problem.table("bits")[layer, bits] + problem.table("rank")[layer, rank],
            parameters[layer] * np.asarray(space.bits, dtype=np.int64)[bits],
            (float(budget.limit_bytes - problem.memory.constant_bytes(budget.scope)), cap),
        )

    def fits(self, taken: NDArray[np.int64]) -> bool:
        """Whether one choice a layer, (L,), is within the limits."""
        return bool(self.bytes[taken].sum() <= self.limits[0] and self.weighted_bits[taken].sum() <= self.limits[1])

    def best_by(self, *keys: NDArray[np.float64] | NDArray[np.int64]) -> NDArray[np.int64]:
        """The choice of each layer that is least by the first key, then by the next, (L,)."""
        order = np.lexsort((*reversed(keys), self.layer))
        return order[np.searchsorted(self.layer[order], np.arange(self.problem.num_layers))]

    def configuration(self, taken: NDArray[np.int64], shared: Shared) -> Configuration:
        """The configuration made of one choice a layer, (L,), with these settings."""
        return self.problem.space.from_indices(np.stack([self.bits[taken], self.rank[taken]], axis=1), shared)


def _solved(choices: _Choices, gap: float) -> NDArray[np.int64] | None:
    """Best choice of each layer, (L,), None when the solver has none within the limits."""
    from scipy.optimize import LinearConstraint
    from scipy.sparse import csr_array

    size, layers = choices.layer.size, choices.problem.num_layers
    least = np.minimum.reduceat(choices.value, np.searchsorted(choices.layer, np.arange(layers)))
    worth = choices.value - least[choices.layer]
    scale = float(worth.max()) or 1.0
    one_each = csr_array((np.ones(size), (choices.layer, np.arange(size))), shape=(layers, size))
    for slack in (0.0, SLACK):  # the solver may exceed a limit by its tolerance: then ask for a little less
        constraints = [LinearConstraint(one_each, lb=1, ub=1)]
        for taken, limit in zip((choices.bytes, choices.weighted_bits), choices.limits, strict=True):
            if np.isfinite(limit) and limit > 0:  # in units of the limit, which keeps the tolerances meaningful
                constraints.append(LinearConstraint(csr_array(taken[None] / limit), ub=1.0 - slack))
        solution = least_binary(-worth / scale, constraints, gap=gap)
        if solution is None:
            continue
        chosen = choices.best_by(-np.round(solution), choices.bytes)
        if choices.fits(chosen):
            return chosen
    return None


def greedy_choice(choices: _Choices) -> NDArray[np.int64] | None:
    """Choice of each layer, (L,), raised from the smallest by the affordable change of most value a byte, or None.

    The greedy algorithm of the multiple-choice knapsack, for the case that there is no solver's answer.
    """
    starts = (choices.best_by(choices.bytes, -choices.value), choices.best_by(choices.weighted_bits, choices.bytes))
    taken = next((start for start in starts if choices.fits(start)), None)
    if taken is None:
        return None
    while True:
        gain = choices.value - choices.value[taken][choices.layer]
        added = choices.bytes - choices.bytes[taken][choices.layer]
        bits = choices.weighted_bits - choices.weighted_bits[taken][choices.layer]
        affordable = (gain > 0) & (added <= choices.limits[0] - choices.bytes[taken].sum())
        affordable &= bits <= choices.limits[1] - choices.weighted_bits[taken].sum()
        if not affordable.any():
            return taken
        density = np.where(affordable, gain / np.maximum(added, 1e-3), -np.inf)
        best = int(np.argmax(density))
        taken[choices.layer[best]] = best


def bits_then_ranks(
    problem: Problem, floor: int, *, decay: float = 1.0, shared: Shared | None = None, raise_ranks: bool = True
) -> Configuration:
    """Configuration whose bits were chosen with all ranks at the floor, and then its ranks, from the floor up.

    `decay` is that of the error of rounding, see `rounding_error`; settings are as for `best_choice`. Without
    `raise_ranks` all ranks stay at the floor. Raises `InfeasibleBudgetError` when nothing fits with that floor.
    """
    space = problem.space
    rungs = np.asarray(space.ranks)
    at_floor = np.where(rungs == floor, 0.0, -np.inf)
    chosen = best_choice(problem, -rounding_error(problem, decay)[:, :, None] + at_floor, shared=shared)
    if not raise_ranks:
        return chosen
    kept = np.asarray(space.bits) == np.asarray(chosen.bits)[:, None]
    fixed = np.where(kept, 0.0, -np.inf)[:, :, None]
    above = np.where(rungs >= floor, 0.0, -np.inf)
    return best_choice(problem, fixed + (adapter_gain(problem) + above)[:, None, :], shared=shared)


def rounding_error(problem: Problem, decay: float = 1.0) -> Array:
    """I_q(l) 4^(-decay (b - b_0)) of each layer and bit-width, (L, bits).

    The squared error of rounding falls fourfold a bit; what is left of it after fine-tuning may fall more slowly. Where
    an estimator measured the costs c(l, b), they are c(l, b_0) (c(l, b) / c(l, b_0))^decay.
    """
    if problem.importance.costs is not None:
        costs: Array = np.asarray(problem.importance.costs, dtype=np.float64)
        lowest = np.where(costs[:, :1] > 0, costs[:, :1], 1.0)
        return lowest * (costs / lowest) ** decay
    bits = np.asarray(problem.space.bits, dtype=np.float64)
    error: Array = np.asarray(problem.importance.bits)[:, None] * 4.0 ** (decay * (bits[0] - bits))
    return error


def adapter_gain(problem: Problem) -> Array:
    """I_r(l) log2(1 + r) of each layer and rank, (L, ranks), or what an estimator measured that they bring."""
    if problem.importance.gains is not None:
        measured: Array = np.asarray(problem.importance.gains, dtype=np.float64)
        return measured
    ranks = np.asarray(problem.space.ranks, dtype=np.float64)
    gain: Array = np.asarray(problem.importance.rank)[:, None] * np.log2(1.0 + ranks)
    return gain
