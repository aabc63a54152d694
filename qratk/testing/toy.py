"""A search problem in milliseconds: exact synthetic bytes, and a known response surface in place of fine-tuning.

The score of a configuration after T of T_S optimiser steps, in nats above chance, is

    score = sum_l a_l g_l(r, T) - sum_l s_l e(b_l) (1 - c_l g_l(r, T)) - k (sum_l s_l e(b_l))^2 + noise

with e(b) = 4^((2 - b) / 3) the error of rounding, g_l(r, T) = h_l(r) (1 - exp(-T / t(r))) what an adapter has
learnt, h_l(r) = 1 - exp(-r / p_l) its diminishing returns, and t(r) = T_S (0.2 + r / 40) the time it needs: large
ranks learn slowly, so that short runs mislead. s: sensitivity of a layer to low bits, a: what it can learn, c: which
share of the quantisation error its adapter can make up for, k: errors of layers add up worse than their sum. The noise
is drawn from a hash of (seed, configuration, steps) and shrinks with the square root of the steps.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError, InfeasibleBudgetError
from qratk.core.evaluation import Evaluation, Request
from qratk.core.memory import Budget, Footprint, LayerBytes, LayerShape, MemoryModel, PeakBytes, resolve_budget
from qratk.core.problem import Importance, Problem
from qratk.core.space import SearchSpace
from qratk.evaluators.base import EvaluationContext, Evaluator

Array = NDArray[np.float64]
LARGEST_BRUTE_FORCE = 5_000_000
GROUP_SIZE = 64


@dataclass(frozen=True)
class ToyLandscape:
    """The response surface over `num_layers` layers, drawn from `seed`; see the module's docstring for the formula.

    Args:
        num_layers: L.
        seed: which landscape.
        total_steps: T_S, at which the learning curves are nearly flat.
        noise: standard deviation of a score at T_S.
        interaction: k.
    """

    num_layers: int
    seed: int = 0
    total_steps: int = 900
    noise: float = 0.01
    interaction: float = 0.1

    @cached_property
    def _draws(self) -> dict[str, Array]:
        rng = np.random.default_rng([self.seed, self.num_layers])
        size = self.num_layers
        sensitivity, learnable = rng.lognormal(sigma=1.5, size=size), rng.lognormal(sigma=1.0, size=size)
        return {
            "sensitivity": sensitivity / sensitivity.sum(),
            "learnable": 0.5 * learnable / learnable.sum(),
            "compensation": rng.uniform(0.2, 0.7, size=size),
            "half_rank": rng.uniform(3.0, 12.0, size=size),
        }

    @property
    def sensitivity(self) -> Array:
        """s, (L,): what a perfect bits importance would say."""
        return self._draws["sensitivity"]

    @property
    def learnable(self) -> Array:
        """a + c s, (L,): what a perfect rank importance would say."""
        return self._draws["learnable"] + 0.1 * self._draws["compensation"] * self.sensitivity

    def truth(self, bits: NDArray[np.int64], ranks: NDArray[np.int64], steps: int) -> Array:
        """Scores without noise of configurations with the given bits and ranks, both (n, L); (n,)."""
        draws = self._draws
        learnt = 1 - np.exp(-steps / (self.total_steps * (0.2 + ranks / 40.0)))
        gain = (1 - np.exp(-ranks / draws["half_rank"])) * learnt
        error = draws["sensitivity"] * 4.0 ** ((2.0 - bits) / 3.0)
        total = (draws["learnable"] * gain - error * (1 - draws["compensation"] * gain)).sum(axis=1)
        return np.asarray(total - self.interaction * error.sum(axis=1) ** 2, dtype=np.float64)

    def true_score(self, configuration: Configuration, steps: int) -> float:
        """Score without noise."""
        return float(self.truth(np.array([configuration.bits]), np.array([configuration.ranks]), steps)[0])

    def score(self, configuration: Configuration, steps: int) -> float:
        """Score with the noise that belongs to (configuration, steps)."""
        rng = np.random.default_rng(self.hash(configuration, steps))
        noise = self.noise * np.sqrt(self.total_steps / steps) * rng.standard_normal()
        return self.true_score(configuration, steps) + float(noise)

    def hash(self, configuration: Configuration, steps: int) -> int:
        """64 bits that depend on the landscape, the configuration and the steps alone."""
        text = f"{self.seed}|{configuration}|{steps}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def toy_shapes(num_layers: int, seed: int = 0) -> tuple[LayerShape, ...]:
    """Layers of an attention and an MLP projection, of differing widths of a 3-billion-parameter model's order."""
    rng = np.random.default_rng([seed, num_layers, 1])
    shapes = []
    for layer in range(num_layers):
        hidden, wide = 2560, int(rng.choice([5120, 6912, 8960]))
        shapes.append(LayerShape(f"layers.{layer}", (("attention", hidden, hidden), ("mlp", hidden, wide))))
    return tuple(shapes)


def toy_memory(shapes: Sequence[LayerShape], space: SearchSpace) -> MemoryModel:
    """Bytes of packed weights, 16-bit scale and zero point a group of 64, and 16-bit adapters (Eq. 21-23).

    One bit step then saves some 40 times the bytes of one rank step, as on real models.
    """

    def metadata(shape: LayerShape, bits: int) -> int:
        return 0 if bits >= 16 else sum(4 * -(-d_in * d_out // GROUP_SIZE) for _, d_in, d_out in shape.projections)

    layers = tuple(
        LayerBytes(
            weights={b: sum(-(-d_in * d_out * b // 8) for _, d_in, d_out in s.projections) for b in space.bits},
            metadata={b: metadata(s, b) for b in space.bits},
            adapters={r: 2 * s.adapter_parameters(r) for r in space.ranks},
        )
        for s in shapes
    )
    parameters = tuple(shape.parameters for shape in shapes)
    return MemoryModel(
        space,
        layers,
        parameters,
        fixed_bytes=50_000_000,
        training=PeakBytes(200_000_000, 7.0),
        serving=PeakBytes(30_000_000),
    )


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
) -> Problem:
    """Problem over the toy layers, its importance that of the landscape with the same seed, blurred.

    The budget is what a uniform configuration takes: `like`, by default the middle bits and the highest rank of the
    ladders. `importance_noise` is the standard deviation of the logarithm by which estimates are off.
    """
    shapes = toy_shapes(num_layers, seed)
    space = SearchSpace(tuple(bits), tuple(ranks), tuple(shape.name for shape in shapes))
    memory = toy_memory(shapes, space)
    if like is None and limit is None:
        like = (space.bits[(len(space.bits) - 1) // 2], space.ranks[-1])
    budget = resolve_budget(memory, limit=limit, like=like, max_average_bits=max_average_bits)
    landscape = ToyLandscape(num_layers, seed)
    scores = (
        blurred(landscape.sensitivity, importance_noise, seed, "bits"),
        blurred(landscape.learnable, importance_noise, seed, "rank"),
    )
    return Problem(shapes, memory, budget, Importance(*(tuple(score.tolist()) for score in scores)))


def blurred(scores: Array, noise: float, seed: int, knob: str) -> Array:
    """The scores, each off by a log-normal factor that depends on the seed and the knob, (L,)."""
    rng = np.random.default_rng([seed, len(scores), 2, len(knob)])
    return scores * rng.lognormal(sigma=noise, size=len(scores)) if noise > 0 else scores.copy()


class ToyEvaluator(Evaluator):
    """Scores configurations on a `ToyLandscape`; a whole search takes milliseconds and needs no torch.

    Args:
        num_layers: L.
        seed: which landscape and layers.
        noise: standard deviation of a score at the highest rung.
        importance_noise: standard deviation of the logarithm by which importance estimates are off.
        items: validation items; their outcomes differ, and their mean is the score.
        failures: share of the configurations whose evaluation fails.
    """

    def __init__(
        self,
        num_layers: int = 4,
        seed: int = 0,
        *,
        noise: float = 0.01,
        importance_noise: float = 0.3,
        items: int = 32,
        failures: float = 0.0,
    ) -> None:
        if num_layers < 1 or items < 1 or not 0 <= failures <= 1:
            raise ConfigurationError(
                "num_layers and items must be positive and failures in [0, 1], "
                f"got {num_layers}, {items} and {failures}"
            )
        self.num_layers = num_layers
        self.seed = seed
        self.noise = noise
        self.importance_noise = importance_noise
        self.items = items
        self.failures = failures
        self.landscape = ToyLandscape(num_layers, seed, noise=noise)
        self.calls: list[Request] = []
        self.discarded: list[Evaluation] = []
        self._shapes = toy_shapes(num_layers, seed)

    def open(self, context: EvaluationContext) -> None:
        """Take T_S from the ladder."""
        self.landscape = ToyLandscape(self.num_layers, self.seed, context.ladder.highest, self.noise)

    @property
    def shapes(self) -> tuple[LayerShape, ...]:
        """The toy layers."""
        return self._shapes

    def memory_model(self, space: SearchSpace) -> MemoryModel:
        """Synthetic exact bytes; see `toy_memory`."""
        return toy_memory(self._shapes, space)

    def importance(self, estimator: Any, space: SearchSpace) -> Array:
        """The landscape's truth, blurred; which of the two is told by the estimator's name.

        Estimators of the update (a name with "gradient", "update" or "rank") get what a layer can learn, "uniform" and
        "none" get ones, all others the sensitivity to low bits. The estimator itself is not called: it needs a model.
        """
        name = str(getattr(estimator, "component_name", type(estimator).__name__)).lower()
        if name in ("uniform", "none"):
            return np.ones(self.num_layers)
        if any(word in name for word in ("grad", "update", "rank")):
            return blurred(self.landscape.learnable, self.importance_noise, self.seed, "rank")
        return blurred(self.landscape.sensitivity, self.importance_noise, self.seed, "bits")

    def evaluate(self, requests: Sequence[Request]) -> Iterator[Evaluation]:
        """Evaluations in the order of the requests."""
        for request in requests:
            self.calls.append(request)
            yield self.measure(request.configuration, request.steps)

    def measure(self, configuration: Configuration, steps: int) -> Evaluation:
        """One evaluation: `items` outcomes whose mean is the score, or a failure."""
        footprint = self._footprint(configuration)
        if self.landscape.hash(configuration, 0) < self.failures * 2**64:
            return Evaluation(
                configuration, steps, float("-inf"), footprint, status="failed", reason="loss is not finite (toy)"
            )
        outcomes = self._outcomes(configuration, steps)
        checkpoint = f"checkpoints/{configuration.digest}-{steps}"
        seconds = steps / 1000
        return Evaluation(
            configuration,
            steps,
            float(outcomes.mean()),
            footprint,
            tuple(outcomes.tolist()),
            seconds,
            "ok",
            "",
            checkpoint,
        )

    def _footprint(self, configuration: Configuration) -> Footprint:
        """Bytes, also of uniform references off the ladders."""
        names = tuple(shape.name for shape in self._shapes)
        bits, ranks = sorted(set(configuration.bits)), sorted(set(configuration.ranks))
        return toy_memory(self._shapes, SearchSpace(tuple(bits), tuple(ranks), names)).footprint(configuration)

    def _outcomes(self, configuration: Configuration, steps: int) -> Array:
        """Score plus the items' own difficulty, the same for all configurations, plus a little of each, mean 0."""
        difficulty = np.random.default_rng([self.seed, 3]).normal(size=self.items)
        own = 0.1 * np.random.default_rng([self.landscape.hash(configuration, steps), 4]).normal(size=self.items)
        spread = difficulty + own
        outcomes: Array = self.landscape.score(configuration, steps) + spread - spread.mean()
        return outcomes

    def test(self, evaluation: Evaluation) -> dict[str, float]:
        """The score without noise."""
        return {"score": self.landscape.true_score(evaluation.configuration, evaluation.steps)}

    def discard(self, evaluation: Evaluation) -> None:
        """Nothing is stored; which evaluations were discarded is kept for tests."""
        self.discarded.append(evaluation)

    @property
    def item_weights(self) -> tuple[float, ...] | None:
        """None: all items weigh the same."""
        return None

    def fingerprint(self) -> dict[str, str]:
        """The options that decide the scores."""
        options = (self.num_layers, self.seed, self.noise, self.importance_noise, self.items, self.failures)
        return {"toy": hashlib.sha256(repr(options).encode()).hexdigest()[:16]}

    def problem(
        self,
        *,
        bits: Sequence[int] = (2, 4, 8),
        ranks: Sequence[int] = (4, 8, 16),
        like: tuple[int, int] | None = None,
        limit: str | int | None = None,
        max_average_bits: float | None = None,
    ) -> Problem:
        """The problem that belongs to this evaluator."""
        return toy_problem(
            self.num_layers,
            self.seed,
            bits=bits,
            ranks=ranks,
            like=like,
            limit=limit,
            max_average_bits=max_average_bits,
            importance_noise=self.importance_noise,
        )

    def optimum(self, space: SearchSpace, budget: Budget, *, steps: int | None = None) -> tuple[Configuration, float]:
        """Feasible configuration with the largest score without noise, and that score, by brute force.

        For at most 5 million configurations: 5 layers of 3 bits and 3 ranks have 59,049. Ties go to fewer bytes.
        """
        if (len(space.bits) * len(space.ranks)) ** space.num_layers > LARGEST_BRUTE_FORCE:
            raise ConfigurationError(f"10^{space.log10_size:.1f} configurations are too many for brute force")
        memory = toy_memory(self._shapes, space)
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
        return space.from_indices(winner), best[0]


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
