"""AMQ: bits by the divergence of the frozen model, found by NSGA-II on a predictor that learns (Lee et al. 2025)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
from numpy.typing import NDArray

from qratk.core.checks import Checks
from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError, QuantizationError
from qratk.core.evaluation import Candidate, History
from qratk.core.problem import Problem
from qratk.programs.integer import rounding_error
from qratk.searchers._predicted_front import RadialBasis, Rungs, predicted_front
from qratk.searchers.base import searchers
from qratk.searchers.generations import SingleGenerationSearcher

if TYPE_CHECKING:
    from qratk.evaluators.base import EvaluationContext

Bits = tuple[int, ...]
Archive = dict[Bits, float]
"""Divergences by the bits of the layers."""

LARGEST: Final = 8
"""Ranks, the largest first, that candidates are proposed for."""


@searchers.register("amq")
class AMQ(SingleGenerationSearcher):
    """Searches bits before anything is trained; the best that fits with each rank of the ladder is then a candidate.

    As in arXiv:2509.12019: the divergence (Jensen-Shannon, in nats) of the frozen quantised model's next-token
    distributions from those of the full-precision model is what is searched; layers are assembled from weights that are
    packed already; layers that are far more sensitive than the median one are kept off the lowest bits; a radial basis
    function of the measured configurations predicts the divergence of others; NSGA-II over prediction and bytes
    proposes which to measure next, spread over bytes; and all that was measured teaches the next predictor. The
    adapters have no part in it. Only configurations that the budget has room for, with the lowest rank, are looked at,
    where the paper goes through the whole front.

    Measured divergences are in the journal iteration by iteration, so that an interrupted search goes on; none counts
    as an evaluation. The divergence needs full-precision weights, and so `uniform_baselines: false`. Where a search has
    no model, as on a simulated landscape, the estimated error of rounding stands in for it.

    Args:
        initial: random bits that the first predictor learns from, beside one choice for each layer; 250 in the paper.
        iterations: of predicting, searching, measuring; 200 in the paper.
        measured: configurations that are measured in each; 50 in the paper.
        population, generations: of NSGA-II on the predictor.
        crossover, mutation: its probabilities of a child of two parents, and of a layer's bits to be redrawn.
        sensitivity: a layer whose divergence alone at the lowest bits is over so many times the median is kept off.
        calibration_batches, calibration_batch_size: training batches, and the sequences in each, that models are
            compared on.
        positions: those that predict any token, or a labelled one.
        max_positions: at most as many of these, evenly spaced.
    """

    def __init__(
        self,
        initial: int = 40,
        iterations: int = 8,
        measured: int = 10,
        population: int = 200,
        generations: int = 20,
        crossover: float = 0.9,
        mutation: float = 0.1,
        sensitivity: float = 2.0,
        calibration_batches: int = 2,
        calibration_batch_size: int = 8,
        positions: Literal["labelled", "all"] = "all",
        max_positions: int = 1024,
    ) -> None:
        super().__init__()
        checks = Checks()
        checks.at_least(1, initial=initial, measured=measured, generations=generations, max_positions=max_positions)
        checks.at_least(1, calibration_batches=calibration_batches, calibration_batch_size=calibration_batch_size)
        checks.at_least(0, iterations=iterations)
        checks.at_least(2, population=population)
        for name, value in (("crossover", crossover), ("mutation", mutation)):
            checks.require(0 <= value <= 1, name, value, "must lie in [0, 1]")
        checks.require(sensitivity > 0, "sensitivity", sensitivity, "must be positive")
        self.initial, self.iterations, self.measured = initial, iterations, measured
        self.population, self.generations = population, generations
        self.crossover, self.mutation, self.sensitivity = crossover, mutation, sensitivity
        self.calibration_batches, self.calibration_batch_size = calibration_batches, calibration_batch_size
        checks.require(positions in ("labelled", "all"), "positions", positions, "must be 'labelled' or 'all'")
        checks.finish()
        self.positions: Literal["labelled", "all"] = positions
        self.max_positions = max_positions
        self._context: EvaluationContext | None = None
        self._rng = np.random.default_rng(0)

    def attach(self, context: EvaluationContext) -> None:
        """Take the model and the data."""
        self._context = context

    def ask(self, history: History, rng: np.random.Generator) -> tuple[Candidate, ...]:
        """The best bits for each rank that fits, the largest rank first; nothing the second time."""
        self._rng = rng
        return super().ask(history, rng)

    @property
    def generation_size(self) -> int:
        """As many as a ladder of ranks may have."""
        return LARGEST

    def candidates(self, problem: Problem, known: Collection[Configuration]) -> tuple[Candidate, ...]:
        archive = self._searched(problem)
        found: dict[Configuration, Candidate] = {}
        for rank in reversed(problem.space.ranks):
            fitting = [
                (divergence, problem.bytes(configuration), configuration)
                for bits, divergence in archive.items()
                for configuration in [_with_rank(bits, rank)]
                if problem.feasible(problem.space.settled(configuration))
            ]
            best = min(fitting, default=None)
            if best is not None and best[2] not in known and len(found) < LARGEST:
                found[best[2]] = Candidate(best[2], f"amq:{rank}")
        return tuple(found.values())

    # The search of bits

    def _searched(self, problem: Problem) -> Archive:
        """All that was measured: one layer at the lowest bits each, what the predictor begins with, what it led to."""
        space = problem.space
        proxy = _Proxy(self, problem)
        highest, lowest = space.bits[-1], space.bits[0]
        layers = range(space.num_layers)
        single = [tuple(lowest if layer == own else highest for layer in layers) for own in layers]
        archive = self._decided("amq/sensitivity", partial(proxy.measured, [(highest,) * space.num_layers, *single]))
        allowed = self._allowed(problem, [archive[bits] for bits in single])
        first = self._first(problem, allowed)
        archive |= self._decided("amq/initial", partial(proxy.measured, first))
        for iteration in range(1, self.iterations + 1):
            wanted = self._next(problem, archive, allowed)
            if not wanted:
                break
            archive |= self._decided(f"amq/{iteration}", partial(proxy.measured, wanted))
        return archive

    def _decided(self, key: str, measure: Callable[[], Archive]) -> Archive:
        """What was measured in an earlier process under a key, or is now."""
        if self._context is None:
            return measure()
        pairs = self._context.decided(key, lambda: [[list(bits), value] for bits, value in measure().items()])
        return {tuple(int(b) for b in bits): float(value) for bits, value in pairs}

    def _allowed(self, problem: Problem, single: Sequence[float]) -> list[Sequence[int]]:
        """Rungs of bits that each layer may take; all of them where the budget would have no room otherwise."""
        rungs: Sequence[int] = range(len(problem.space.bits))
        limit = self.sensitivity * float(np.median(single))
        above = rungs[1:] or rungs
        pruned = [rungs if divergence <= limit else above for divergence in single]
        smallest = np.array([[places[0] for places in pruned]])
        return pruned if np.isfinite(_sizes(problem, smallest))[0] else [rungs] * problem.num_layers

    def _first(self, problem: Problem, allowed: Sequence[Sequence[int]]) -> list[Bits]:
        """Uniform bits that fit and random ones of all sizes, as the paper draws them: each with shares of its own."""
        bits, count = np.asarray(problem.space.bits), len(problem.space.bits)
        uniform = np.repeat(np.arange(count)[:, None], problem.num_layers, axis=1)
        fitting = bits[uniform[np.isfinite(_sizes(problem, uniform))]]
        found: dict[Bits, None] = dict.fromkeys(map(tuple, fitting.tolist()))
        for _ in range(20 * self.initial):
            if len(found) >= self.initial:
                break
            shares = self._rng.random(count)
            drawn = np.array([_drawn(places, shares, self._rng) for places in allowed])
            found[tuple(bits[_lowered(problem, drawn, allowed, self._rng)].tolist())] = None
        return list(found)

    def _next(self, problem: Problem, archive: Archive, allowed: Sequence[Sequence[int]]) -> list[Bits]:
        """Bits to measure next: of the predicted front, spread over bytes."""
        bits = np.asarray(problem.space.bits)
        rung_of = {b: rung for rung, b in enumerate(problem.space.bits)}
        points = np.array([[rung_of[b] for b in key] for key in archive], dtype=np.int64)
        model = RadialBasis(points, np.array(list(archive.values())))
        fits = np.isfinite(_sizes(problem, points))
        living = predicted_front(
            points[fits] if fits.any() else np.array([[places[0] for places in allowed]]),
            model,
            lambda rungs: _sizes(problem, rungs),
            allowed,
            self._rng,
            population=self.population,
            generations=self.generations,
            crossover=self.crossover,
            mutation=self.mutation,
        )
        sizes = _sizes(problem, living)
        keys = [tuple(key) for key in bits[living].tolist()]
        new = [n for n, key in enumerate(keys) if key not in archive and np.isfinite(sizes[n])]
        return [keys[n] for n in _spread(new, sizes, self.measured)]


class _Proxy:
    """Divergences of frozen weights, or the estimated error of rounding where there is no model."""

    def __init__(self, options: AMQ, problem: Problem) -> None:
        self._options, self._problem = options, problem
        self._score: Callable[[Bits], float] | None = None

    def measured(self, wanted: Sequence[Bits]) -> Archive:
        """Divergence of each, in order."""
        self._score = self._score or self._opened()
        return {bits: self._score(bits) for bits in wanted}

    def _opened(self) -> Callable[[Bits], float]:
        context, problem, options = self._options._context, self._problem, self._options
        if context is None or context.module is None or context.datamodule is None:
            return self._estimated()
        backbone = context.module.backbone
        if tuple(shape.name for shape in backbone.shapes) != problem.space.layer_names:
            return self._estimated()  # a landscape is searched, and the command's model has no part in it
        import torch

        from qratk.training.divergence import FrozenDivergence

        batches = context.datamodule.calibration_batches(options.calibration_batches, options.calibration_batch_size)
        device = backbone.model.get_input_embeddings().weight.device
        frozen = FrozenDivergence(
            context.module, device, batches, kind=options.positions, most=options.max_positions, dtype=torch.float32
        )
        try:
            backbone.build_bank(sorted({*problem.space.bits, *context.reference_bits}))
            frozen.take_targets()
        except QuantizationError as error:
            raise ConfigurationError(
                "amq compares with full-precision weights, which are gone once something was trained: set "
                f"uniform_baselines to false ({error})"
            ) from error
        context.say("Searching bits by the divergence of frozen weights.")
        return lambda bits: -frozen.score(_with_rank(bits, 0)).score

    def _estimated(self) -> Callable[[Bits], float]:
        table = rounding_error(self._problem)
        place = {bits: rung for rung, bits in enumerate(self._problem.space.bits)}
        return lambda bits: float(sum(table[layer, place[b]] for layer, b in enumerate(bits)))


def _with_rank(bits: Bits, rank: int) -> Configuration:
    return Configuration.of(bits, [rank] * len(bits))


def _sizes(problem: Problem, rungs: Rungs) -> NDArray[np.float64]:
    """Bytes with the lowest rank everywhere, (n,), infinite over the budget or its cap on the average bits."""
    rows, budget, space = np.arange(problem.num_layers), problem.budget, problem.space
    sizes = problem.table("bits")[rows, rungs].sum(axis=1) + int(problem.table("rank")[:, 0].sum())
    sizes = sizes + problem.memory.constant_bytes(budget.scope)
    fits = sizes <= budget.limit_bytes
    if budget.max_average_bits is not None:
        weights = np.asarray(problem.memory.parameters, dtype=np.float64)
        average = np.asarray(space.bits)[rungs] @ weights / weights.sum()
        fits &= average <= budget.max_average_bits * (1 + 1e-12)
    return np.where(fits, sizes.astype(np.float64), np.inf)


def _lowered(problem: Problem, rungs: Rungs, allowed: Sequence[Sequence[int]], rng: np.random.Generator) -> Rungs:
    """Rungs, (L,), stepped down at random layers until they fit."""
    rungs = rungs.copy()
    while not np.isfinite(_sizes(problem, rungs[None]))[0]:
        able = [layer for layer, places in enumerate(allowed) if rungs[layer] > places[0]]
        rungs[able[int(rng.integers(len(able)))]] -= 1
    return rungs


def _drawn(places: Sequence[int], shares: NDArray[np.float64], rng: np.random.Generator) -> int:
    """One of the places, in proportion to its share."""
    own = shares[list(places)]
    return int(rng.choice(places, p=own / own.sum()))


def _spread(new: Sequence[int], sizes: NDArray[np.float64], most: int) -> list[int]:
    """At most so many of the numbers, spread over sizes: the largest, then again and again the farthest from all."""
    left, chosen = list(new), list[int]()
    while left and len(chosen) < most:
        if chosen:
            gaps = [min(abs(sizes[n] - sizes[c]) for c in chosen) for n in left]
            chosen.append(left.pop(int(np.argmax(gaps))))
        else:
            chosen.append(left.pop(int(np.argmax(sizes[left]))))
    return chosen
