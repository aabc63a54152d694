"""A search problem in milliseconds: the simulated evaluator at a small size, with its optimum by brute force."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError, InfeasibleBudgetError
from qratk.core.evaluation import Evaluation, Request
from qratk.core.memory import Budget, MemoryModel, resolve_budget
from qratk.core.problem import Importance, Problem
from qratk.core.shared import Setting, shared_ladders
from qratk.core.space import SearchSpace
from qratk.evaluators.landscape import Landscape, LandscapeOptions, blurred, simulated_memory, simulated_shapes
from qratk.evaluators.on_landscape import LandscapeEvaluator

Array = NDArray[np.float64]
LARGEST_BRUTE_FORCE = 5_000_000
ToyLandscape = Landscape


def toy_problem(
    num_layers: int = 4,
    seed: int = 0,
    *,
    bits: Sequence[int] = (2, 4, 8),
    ranks: Sequence[int] = (4, 8, 16),
    like: tuple[int, int] | None = None,
    limit: str | int | None = None,
    max_average_bits: float | None = None,
    importance_noise: float = 0.3,
    shared: Mapping[str, Sequence[Setting]] | None = None,
) -> Problem:
    """Problem over the simulated layers, its importance that of the landscape with the same seed, blurred.

    The budget is what a uniform configuration takes: `like`, by default the middle bits and the highest rank of the
    ladders. `importance_noise` is the standard deviation of the logarithm by which estimates are off.
    """
    shapes = simulated_shapes(num_layers, seed)
    space = SearchSpace(tuple(bits), tuple(ranks), tuple(shape.name for shape in shapes), shared_ladders(shared))
    memory = simulated_memory(shapes, space)
    if like is None and limit is None:
        like = (space.bits[(len(space.bits) - 1) // 2], space.ranks[-1])
    budget = resolve_budget(memory, limit=limit, like=like, max_average_bits=max_average_bits)
    landscape = Landscape(num_layers, seed)
    scores = (
        blurred(landscape.sensitivity, importance_noise, seed, "bits"),
        blurred(landscape.learnable, importance_noise, seed, "rank"),
    )
    return Problem(shapes, memory, budget, Importance(*(tuple(score.tolist()) for score in scores)))


class ToyEvaluator(LandscapeEvaluator):
    """The simulated evaluator on few layers; it remembers what was asked, and knows the optimum.

    Each request stands alone, as with a slow evaluator, so that tests can interrupt a search anywhere. The class is
    open: a test overrides `evaluate` for an evaluator that is slow, breaks down or looks on.

    Args:
        num_layers: L.
        seed: which landscape and layers.
        noise: standard deviation of a score at the highest rung.
        options: those of `SimulatedEvaluator`.

    Attributes:
        calls: the requests that were evaluated.
        discarded: the evaluations that were discarded.
    """

    def __init__(self, num_layers: int = 4, seed: int = 0, *, noise: float = 0.01, **options: Any) -> None:
        landscape = LandscapeOptions.of({"noise": noise, **(options.pop("landscape", None) or {})})
        super().__init__(num_layers, seed, landscape=landscape, **options)
        self.calls: list[Request] = []
        self.discarded: list[Evaluation] = []

    def evaluate(self, group: Sequence[Request]) -> Sequence[Evaluation]:
        """Evaluations in the order of the requests."""
        self.calls += group
        return [self.measure(request.configuration, request.steps, request.replicate) for request in group]

    def discard(self, evaluation: Evaluation) -> None:
        """Nothing is stored; which evaluations were discarded is kept for tests."""
        self.discarded.append(evaluation)

    def problem(
        self,
        *,
        bits: Sequence[int] = (2, 4, 8),
        ranks: Sequence[int] = (4, 8, 16),
        like: tuple[int, int] | None = None,
        limit: str | int | None = None,
        max_average_bits: float | None = None,
        shared: Mapping[str, Sequence[Setting]] | None = None,
    ) -> Problem:
        """The problem that belongs to this evaluator."""
        return toy_problem(
            self.num_layers,
            self.landscape.seed,
            bits=bits,
            ranks=ranks,
            like=like,
            limit=limit,
            max_average_bits=max_average_bits,
            importance_noise=self.drawn_noise,
            shared=shared,
        )

    def optimum(self, space: SearchSpace, budget: Budget, *, steps: int | None = None) -> tuple[Configuration, float]:
        """Feasible configuration with the largest score without noise, and that score, by brute force.

        For at most 5 million configurations: 5 layers of 3 bits and 3 ranks have 59,049. Ties go to fewer bytes.
        """
        if (len(space.bits) * len(space.ranks)) ** space.num_layers > LARGEST_BRUTE_FORCE:
            raise ConfigurationError(f"10^{space.log10_size:.1f} configurations are too many for brute force")
        memory = simulated_memory(self._shapes, space)
        steps = self.landscape.total_steps if steps is None else steps
        best: tuple[float, int] | None = None
        winner: NDArray[np.int64] | None = None
        for block in _blocks(space):
            sizes, average = _sizes(memory, block, budget)
            fits = sizes <= budget.limit_bytes
            if budget.max_average_bits is not None:
                fits &= average <= budget.max_average_bits * (1 + 1e-12)
            if not fits.any():
                continue
            block, sizes = block[fits], sizes[fits]
            scores = self.landscape.truth(
                np.array(space.bits)[block[..., 0]], np.array(space.ranks)[block[..., 1]], steps
            )
            index = int(np.lexsort((sizes, -scores))[0])
            key = (float(scores[index]), -int(sizes[index]))
            if best is None or key > best:
                best, winner = key, block[index]
        if best is None or winner is None:
            raise InfeasibleBudgetError(f"no configuration fits {budget.limit_bytes} bytes")
        shared = self.landscape.best_shared(space)
        return space.from_indices(winner, shared), best[0] + self.landscape.worth(shared)


def _blocks(space: SearchSpace, size: int = 100_000) -> Iterator[NDArray[np.int64]]:
    """All configurations as indices, (n, L, 2) a block."""
    choices = list(itertools.product(range(len(space.bits)), range(len(space.ranks))))
    rows = itertools.product(choices, repeat=space.num_layers)
    while block := list(itertools.islice(rows, size)):
        yield np.array(block, dtype=np.int64)


def _sizes(memory: MemoryModel, block: NDArray[np.int64], budget: Budget) -> tuple[NDArray[np.int64], Array]:
    """Bytes in the budget's scope and average bits of a block, each (n,)."""
    rows = np.arange(memory.space.num_layers)
    tables = memory.table(budget.scope, "bits"), memory.table(budget.scope, "rank")
    sizes = sum(table[rows, block[..., column]].sum(axis=1) for column, table in enumerate(tables))
    weights = np.asarray(memory.parameters, dtype=np.float64)
    average = np.array(memory.space.bits)[block[..., 0]] @ weights / weights.sum()
    return np.asarray(sizes + memory.constant_bytes(budget.scope)), average
