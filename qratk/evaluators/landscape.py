"""A known response surface in place of fine-tuning: what the simulated evaluator scores configurations by.

The score of a configuration after T of T_S optimiser steps, in nats above chance, is

    score = sum_l a_l g_l(r_l, T) - sum_l s_l e(b_l) (1 - c_l g_l(r_l, T)) - k E^2 - n sum_l w_l E_l E_{l+1}
            + x (1 - T / T_S) (u . z(b, r)) / sqrt(2 L) + noise,        E_l = s_l e(b_l),  E = sum_l E_l

with e(b) = error_per_bit^(2 - b) the harm of rounding to b bits, g_l(r, T) = h_l(r) (1 - exp(-T / t_l(r))) what an
adapter has learnt, h_l(r) = 1 - exp(-r / p_l) its diminishing returns, and
t_l(r) = T_S (slowness + r slowness_per_rank) v_l the time it takes: large ranks learn slowly, so that learning curves
cross between rungs and short runs mislead.

Drawn for each layer: s its sensitivity to low bits, a what it can learn, c which share of the quantisation error its
adapter can make up for, p and v how many ranks and how long that takes. k: errors of all layers add up worse than their
sum; n: those of neighbours compound or cancel. x: what short runs like for no good reason, in a random direction u of
log2 bits and log2 ranks. The noise is drawn from a hash of (seed, configuration, steps), and of the replicate where
that is not the first, and shrinks with the square root of the steps.

A configuration with shared settings has their worth on top: a learning rate v loses c (log10 v - log10 v*)^2, v* being
the best rate and c its curvature; each value of any other setting is worth a draw from a normal distribution.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qratk.core.configuration import KNOBS, Configuration, Knob
from qratk.core.errors import ConfigurationError
from qratk.core.memory import Budget, LayerBytes, LayerShape, MemoryModel, PeakBytes
from qratk.core.problem import Problem
from qratk.core.shared import Shared
from qratk.core.space import SearchSpace
from qratk.programs.integer import best_choice

Array = NDArray[np.float64]
Range = float | tuple[float, float]
GROUP_SIZE = 64


@dataclass(frozen=True)
class LandscapeOptions:
    """Parameters of the surface; each a number, or a pair (low, high) from which a landscape's own value is drawn.

    Those marked (by layer) are drawn for every layer, uniformly from the pair.

    Args:
        sensitivity_spread: standard deviation of the logarithm of the layers' sensitivities; they sum to 1.
        learnable: what all adapters together can learn, sum of a.
        learnable_spread: standard deviation of the logarithm of a.
        compensation: c (by layer).
        half_rank: p (by layer).
        error_per_bit: by how much the harm of rounding falls with a bit.
        interaction: k.
        neighbours: n; the weights w are standard normal.
        slowness, slowness_per_rank: time to learn, as a share of T_S.
        slowness_spread: standard deviation of the logarithm of v.
        crossing: x.
        noise: standard deviation of a score at T_S.
        best_rate: learning rate v*, for configurations that have one of their own.
        rate_curvature: c.
        settings_spread: standard deviation of what values of other shared settings are worth.
    """

    sensitivity_spread: float | tuple[float, float] = 1.5
    learnable: float | tuple[float, float] = 0.5
    learnable_spread: float | tuple[float, float] = 1.0
    compensation: float | tuple[float, float] = (0.2, 0.7)
    half_rank: float | tuple[float, float] = (3.0, 12.0)
    error_per_bit: float | tuple[float, float] = 4.0 ** (1 / 3)
    interaction: float | tuple[float, float] = 0.1
    neighbours: float | tuple[float, float] = 0.0
    slowness: float | tuple[float, float] = 0.2
    slowness_per_rank: float | tuple[float, float] = 1 / 40
    slowness_spread: float | tuple[float, float] = 0.0
    crossing: float | tuple[float, float] = 0.0
    noise: float | tuple[float, float] = 0.01
    best_rate: float | tuple[float, float] = field(default=3e-3, repr=False)
    rate_curvature: float | tuple[float, float] = field(default=0.15, repr=False)
    settings_spread: float | tuple[float, float] = field(default=0.05, repr=False)

    def __post_init__(self) -> None:
        for name in (own.name for own in fields(self)):
            low, high = _pair(name, getattr(self, name))
            positive = name in ("error_per_bit", "half_rank", "slowness", "best_rate")
            if low > high or low < 0 or (positive and low == 0):
                raise ConfigurationError(
                    f"landscape: {name} must be {'positive' if positive else 'at least 0'}, as a number or as an "
                    f"ascending pair [low, high]; got {getattr(self, name)}"
                )

    @classmethod
    def of(cls, given: LandscapeOptions | Mapping[str, Any] | None) -> LandscapeOptions:
        """Options from themselves, from a mapping of some of them, or the defaults; raises `ConfigurationError`."""
        if given is None or isinstance(given, LandscapeOptions):
            return given or cls()
        unknown = sorted(given.keys() - {own.name for own in fields(cls)})
        if unknown:
            raise ConfigurationError(
                f"landscape: unknown parameters {unknown}; known are {', '.join(f.name for f in fields(cls))}"
            )
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in given.items()})

    @property
    def of_settings(self) -> dict[str, Range]:
        """The parameters that shared settings have a worth by, those that are not the defaults."""
        own = {each.name: each for each in fields(self) if not each.repr}
        return {name: getattr(self, name) for name, each in own.items() if getattr(self, name) != each.default}

    def drawn(self, name: str, rng: np.random.Generator) -> float:
        """A parameter's value for one landscape."""
        low, high = _pair(name, getattr(self, name))
        return low if low == high else float(rng.uniform(low, high))


def _pair(name: str, value: Any) -> tuple[float, float]:
    try:
        low, high = (value, value) if isinstance(value, int | float) else value
        return float(low), float(high)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"landscape: {name} must be a number or a pair [low, high], got {value!r}") from error


@dataclass(frozen=True)
class Landscape:
    """The response surface over `num_layers` layers, drawn from `seed`; see the module's docstring for the formula.

    Args:
        num_layers: L.
        seed: which landscape.
        total_steps: T_S.
        options: parameters, or the ranges that they are drawn from.
    """

    num_layers: int
    seed: int = 0
    total_steps: int = 900
    options: LandscapeOptions = LandscapeOptions()  # frozen

    @cached_property
    def parameters(self) -> dict[str, float]:
        """The parameters of this landscape that are one number."""
        rng = np.random.default_rng([self.seed, self.num_layers, 6])
        names = [f.name for f in fields(LandscapeOptions) if f.name not in ("compensation", "half_rank")]
        return {name: self.options.drawn(name, rng) for name in names}

    @cached_property
    def _draws(self) -> dict[str, Array]:
        rng, size, values = np.random.default_rng([self.seed, self.num_layers]), self.num_layers, self.parameters
        sensitivity = rng.lognormal(sigma=values["sensitivity_spread"], size=size)
        learnable = rng.lognormal(sigma=values["learnable_spread"], size=size)
        draws = {
            "sensitivity": sensitivity / sensitivity.sum(),
            "learnable": values["learnable"] * learnable / learnable.sum(),
            "compensation": rng.uniform(*_pair("compensation", self.options.compensation), size=size),
            "half_rank": rng.uniform(*_pair("half_rank", self.options.half_rank), size=size),
        }
        more = np.random.default_rng([self.seed, self.num_layers, 5])
        return {
            **draws,
            "slowness": more.lognormal(sigma=values["slowness_spread"], size=size),
            "neighbours": more.normal(size=max(0, size - 1)),
            "likes_bits": more.normal(size=size),
            "likes_rank": more.normal(size=size),
        }

    @property
    def sensitivity(self) -> Array:
        """s, (L,): what a perfect bits importance would say."""
        return self._draws["sensitivity"]

    @property
    def learnable(self) -> Array:
        """a + 0.1 c s, (L,): what a perfect rank importance would say."""
        return self._draws["learnable"] + 0.1 * self._draws["compensation"] * self.sensitivity

    def _parts(self, bits: NDArray[Any], ranks: NDArray[Any], steps: int) -> tuple[Array, Array]:
        """What each layer adds to the score by itself, and its error E_l, for bits and ranks of shape (..., L)."""
        draws, values = self._draws, self.parameters
        time = (values["slowness"] + ranks * values["slowness_per_rank"]) * draws["slowness"]
        learnt = 1 - np.exp(-steps / (self.total_steps * time))
        gain = (1 - np.exp(-ranks / draws["half_rank"])) * learnt
        error = draws["sensitivity"] * values["error_per_bit"] ** (2.0 - bits)
        alone = draws["learnable"] * gain - error * (1 - draws["compensation"] * gain)
        if values["crossing"] and steps < self.total_steps:
            wish = draws["likes_bits"] * (np.log2(bits) - 2) + draws["likes_rank"] * (np.log2(1 + ranks) - 3)
            share = values["crossing"] * (1 - steps / self.total_steps)
            alone = alone + share * wish / np.sqrt(2 * self.num_layers)
        return alone, error

    def truth(self, bits: NDArray[np.int64], ranks: NDArray[np.int64], steps: int) -> Array:
        """Scores without noise of configurations with the given bits and ranks, both (n, L); (n,)."""
        alone, error = self._parts(bits, ranks, steps)
        together = self.parameters["interaction"] * error.sum(axis=1) ** 2
        if self.parameters["neighbours"]:
            pairs = error[:, :-1] * error[:, 1:]
            together = together + self.parameters["neighbours"] * (pairs @ self._draws["neighbours"])
        return np.asarray(alone.sum(axis=1) - together, dtype=np.float64)

    def linearised(self, configuration: Configuration, space: SearchSpace, steps: int) -> Array:
        """Value of every choice of every layer, (L, bits, ranks), while the others stay as in a configuration."""
        error = self._parts(np.array(configuration.bits), np.array(configuration.ranks), steps)[1]
        weights, slope = self._draws["neighbours"], np.full(self.num_layers, 0.0)
        slope += 2 * self.parameters["interaction"] * error.sum()
        slope[:-1] += self.parameters["neighbours"] * weights * error[1:]
        slope[1:] += self.parameters["neighbours"] * weights * error[:-1]
        values = np.empty((self.num_layers, len(space.bits), len(space.ranks)))
        for (i, bits), (j, rank) in itertools.product(enumerate(space.bits), enumerate(space.ranks)):
            own = self._parts(np.full(self.num_layers, bits), np.full(self.num_layers, rank), steps)
            values[:, i, j] = own[0] - slope * own[1]
        return values

    def true_score(self, configuration: Configuration, steps: int) -> float:
        """Score without noise."""
        alone = float(self.truth(np.array([configuration.bits]), np.array([configuration.ranks]), steps)[0])
        return alone + self.worth(configuration.shared)

    def worth(self, shared: Shared) -> float:
        """What shared settings add to the score, at any number of steps; 0 without any."""
        total = 0.0
        for name, value in shared:
            if name == "learning_rate":
                away = math.log10(max(float(value), 1e-300) / self.parameters["best_rate"])
                total -= self.parameters["rate_curvature"] * away**2
            else:
                digest = hashlib.sha256(f"{self.seed}|{name}|{value}".encode()).digest()
                drawn = np.random.default_rng(int.from_bytes(digest[:8], "big")).standard_normal()
                total += self.parameters["settings_spread"] * float(drawn)
        return total

    def best_shared(self, space: SearchSpace) -> Shared:
        """The settings of a space that are worth most."""
        return max(space.all_shared, key=self.worth)

    def score(self, configuration: Configuration, steps: int, replicate: int = 0) -> float:
        """Score with the noise that belongs to (configuration, steps, replicate)."""
        rng = np.random.default_rng(self.hash(configuration, steps, replicate))
        noise = self.parameters["noise"] * np.sqrt(self.total_steps / steps) * rng.standard_normal()
        return self.true_score(configuration, steps) + float(noise)

    def hash(self, configuration: Configuration, steps: int, replicate: int = 0) -> int:
        """64 bits that depend on the landscape, the configuration, the steps and the replicate alone."""
        text = f"{self.seed}|{configuration}|{steps}" + (f"|{replicate}" if replicate else "")
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def simulated_shapes(num_layers: int, seed: int = 0) -> tuple[LayerShape, ...]:
    """Layers of an attention and an MLP projection, of differing widths of a 3-billion-parameter model's order."""
    rng = np.random.default_rng([seed, num_layers, 1])
    shapes = []
    for layer in range(num_layers):
        hidden, wide = 2560, int(rng.choice([5120, 6912, 8960]))
        shapes.append(LayerShape(f"layers.{layer}", (("attention", hidden, hidden), ("mlp", hidden, wide))))
    return tuple(shapes)


def simulated_memory(shapes: tuple[LayerShape, ...], space: SearchSpace) -> MemoryModel:
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
    return MemoryModel(
        space,
        layers,
        tuple(shape.parameters for shape in shapes),
        fixed_bytes=50_000_000,
        training=PeakBytes(200_000_000, 7.0),
        serving=PeakBytes(30_000_000),
    )


def blurred(scores: Array, noise: float, seed: int, knob: Knob) -> Array:
    """The scores, each off by a log-normal factor that depends on the seed and the knob, (L,)."""
    rng = np.random.default_rng([seed, len(scores), 2, 4 + KNOBS.index(knob)])
    return scores * rng.lognormal(sigma=noise, size=len(scores)) if noise > 0 else scores.copy()


def best_known(landscape: Landscape, problem: Problem, *, start: Configuration) -> tuple[Configuration, float]:
    """The best feasible configuration that can be found knowing the surface, and its score without noise at T_S.

    Integer programs over the linearised surface until they repeat, then the best of all single edits and of all pairs
    of an edit up and one down, until none helps. On small spaces it is the optimum (tests compare with brute force).
    """
    climber = _Climber(landscape, problem.memory, problem.budget)
    shared = landscape.best_shared(problem.space)
    best, seen, here = start, set[Configuration](), start.with_shared(shared)
    for _ in range(20):
        values = landscape.linearised(here, problem.space, landscape.total_steps)
        here = best_choice(problem, values, shared=shared)
        best = max(best, here, key=climber.score)
        if here in seen:
            break
        seen.add(here)
    best = climber.climbed(best)
    return best, climber.score(best)


class _Climber:
    """Steepest ascent on the true surface by single edits and by pairs of one up and one down."""

    def __init__(self, landscape: Landscape, memory: MemoryModel, budget: Budget) -> None:
        self.landscape, self.memory, self.budget = landscape, memory, budget
        space = memory.space
        self.bits, self.ranks = np.array(space.bits), np.array(space.ranks)

    def score(self, configuration: Configuration) -> float:
        return self.landscape.true_score(configuration, self.landscape.total_steps)

    def climbed(self, configuration: Configuration, rounds: int = 60) -> Configuration:
        indices = self.memory.space.indices(configuration)
        best = self.score(configuration.with_shared(()))
        for _ in range(rounds):
            moves = self._moves(indices)
            fitting = moves[self._fits(moves)]
            scores = self.landscape.truth(
                self.bits[fitting[:, :, 0]], self.ranks[fitting[:, :, 1]], self.landscape.total_steps
            )
            if not len(scores) or scores.max() <= best + 1e-12:
                break
            indices, best = fitting[int(scores.argmax())], float(scores.max())
        return self.memory.space.from_indices(indices, configuration.shared)

    def _moves(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        singles = {}
        for direction in (1, -1):
            rungs = np.array([len(self.bits), len(self.ranks)])
            rows, columns = np.nonzero((indices + direction >= 0) & (indices + direction < rungs))
            singles[direction] = list(zip(rows.tolist(), columns.tolist(), strict=True))
        edits = [[(*edit, direction)] for direction, found in singles.items() for edit in found]
        edits += [[(*up, 1), (*down, -1)] for up in singles[1] for down in singles[-1] if up != down]
        moves = np.repeat(indices[None], len(edits), axis=0)
        for number, steps in enumerate(edits):
            for layer, column, direction in steps:
                moves[number, layer, column] += direction
        return moves

    def _fits(self, moves: NDArray[np.int64]) -> NDArray[np.bool_]:
        memory, budget, rows = self.memory, self.budget, np.arange(moves.shape[1])
        tables = memory.table(budget.scope, "bits"), memory.table(budget.scope, "rank")
        sizes = sum(table[rows, moves[:, :, column]].sum(axis=1) for column, table in enumerate(tables))
        fits = sizes + memory.constant_bytes(budget.scope) <= budget.limit_bytes
        if budget.max_average_bits is not None:
            weights = np.asarray(memory.parameters, dtype=np.float64)
            average = self.bits[moves[:, :, 0]] @ weights / weights.sum()
            fits &= average <= budget.max_average_bits * (1 + 1e-12)
        return np.asarray(fits)
