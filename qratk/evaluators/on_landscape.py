"""What evaluators on a known response surface share: microseconds a configuration, and no model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from qratk.core.checks import Checks
from qratk.core.configuration import Configuration
from qratk.core.evaluation import Evaluation
from qratk.core.memory import Footprint, LayerShape, MemoryModel
from qratk.core.shared import SharedLadder
from qratk.core.space import SearchSpace
from qratk.evaluators.base import EvaluationContext, Evaluator
from qratk.evaluators.landscape import Landscape, LandscapeOptions, blurred, simulated_memory, simulated_shapes
from qratk.run import files

if TYPE_CHECKING:
    from qratk.estimators.base import ImportanceEstimator

Array = NDArray[np.float64]

_MOST: Final = 100_000  # layers or items: more would fill the memory without a word


class LandscapeEvaluator(Evaluator):
    """Knows layers, bytes, importance and scores of a `Landscape`; a leaf says in what groups it measures.

    Args:
        num_layers: L.
        seed: which landscape and layers; that of the search by default.
        landscape: parameters of the surface, each a number or a range to draw from; see `LandscapeOptions`.
        importance_noise: standard deviation of the logarithm by which importance estimates are off, or a range of it.
        estimator_noise: the same for single estimators by name, as in {quantization_error: 1.0}.
        items: validation items; their outcomes differ, and their mean is the score.
        failures: share of the configurations whose evaluation fails.
        seconds_per_step: what an optimiser step is said to take.
    """

    def __init__(
        self,
        num_layers: int = 24,
        seed: int | None = None,
        *,
        landscape: LandscapeOptions | None = None,
        importance_noise: float | tuple[float, float] = 0.3,
        estimator_noise: Mapping[str, float] | None = None,
        items: int = 32,
        failures: float = 0.0,
        seconds_per_step: float = 0.001,
    ) -> None:
        checks = Checks()
        for option, given in (("num_layers", num_layers), ("items", items)):
            checks.require(1 <= given <= _MOST, option, given, f"must be between 1 and {_MOST:,}")
        checks.require(0 <= failures <= 1, "failures", failures, "must lie in [0, 1]")
        checks.finish()
        self.num_layers = num_layers
        self.seed = seed
        self.options = LandscapeOptions.of(landscape)
        self.importance_noise = importance_noise
        self.estimator_noise = dict(estimator_noise or {})
        self.items = items
        self.failures = failures
        self.seconds_per_step = seconds_per_step
        self._settle(seed or 0, 900)

    def _settle(self, seed: int, total_steps: int) -> None:
        self.landscape = Landscape(self.num_layers, seed, total_steps, self.options)
        self._shapes = simulated_shapes(self.num_layers, seed)
        self._difficulty = np.random.default_rng([seed, 3]).normal(size=self.items)  # of the items
        self._memory: MemoryModel | None = None  # over all that was measured so far

    def open(self, context: EvaluationContext) -> None:
        """Take T_S from the ladder, and the seed of the search unless one was given."""
        self._settle(context.seed if self.seed is None else self.seed, context.ladder.highest)

    @property
    def shapes(self) -> tuple[LayerShape, ...]:
        """The simulated layers."""
        return self._shapes

    def check_shared(self, ladder: SharedLadder) -> None:
        """As for fine-tuning: the landscape has an optimum for the learning rate, and draws a worth for the others."""
        from qratk.training.options import check_shared

        check_shared(ladder)

    def memory_model(self, space: SearchSpace) -> MemoryModel:
        """Synthetic exact bytes; see `simulated_memory`."""
        return simulated_memory(self._shapes, space)

    def footprint(self, configuration: Configuration) -> Footprint:
        """Exact bytes of a configuration, on or off the ladders of the search."""
        bits, ranks = set(configuration.bits), set(configuration.ranks)
        if self._memory is not None:
            bits, ranks = bits.union(self._memory.space.bits), ranks.union(self._memory.space.ranks)
        space = SearchSpace(tuple(sorted(bits)), tuple(sorted(ranks)), tuple(shape.name for shape in self.shapes))
        if self._memory is None or space != self._memory.space:
            self._memory = self.memory_model(space)
        return self._memory.footprint(configuration)

    def importance(self, estimator: ImportanceEstimator, space: SearchSpace) -> Array:
        """The landscape's truth of what the estimator measures, blurred; ones where it measures nothing.

        The estimator itself is not called: it needs a model.
        """
        if estimator.measures == "nothing":
            return np.ones(self.num_layers)
        noise = self.estimator_noise.get(estimator.component_name or "", self.drawn_noise)
        if estimator.measures == "learnable":
            return blurred(self.landscape.learnable, noise, self.landscape.seed, "rank")
        return blurred(self.landscape.sensitivity, noise, self.landscape.seed, "bits")

    @property
    def drawn_noise(self) -> float:
        """`importance_noise` of this landscape."""
        if isinstance(self.importance_noise, int | float):
            return float(self.importance_noise)
        return float(np.random.default_rng([self.landscape.seed, 7]).uniform(*self.importance_noise))

    @property
    def replicates(self) -> bool:
        """Each replicate has a noise of its own."""
        return True

    def measure(self, configuration: Configuration, steps: int, replicate: int = 0) -> Evaluation:
        """One evaluation: `items` outcomes whose mean is the score, or a failure, the same in every replicate."""
        footprint = self.footprint(configuration)
        if self.landscape.hash(configuration, 0) < self.failures * 2**64:
            return Evaluation(
                configuration, steps, float("-inf"), footprint, status="failed",
                reason="loss is not finite (simulated)", replicate=replicate,
            )  # fmt: skip
        outcomes = self._outcomes(configuration, steps, replicate)
        folder = f"{configuration.digest}-{steps}" + (f"-{replicate}" if replicate else "")
        return Evaluation(
            configuration,
            steps,
            float(outcomes.mean()),
            footprint,
            tuple(outcomes.tolist()),
            steps * self.seconds_per_step,
            checkpoint=f"{files.CHECKPOINTS}/{folder}",
            replicate=replicate,
        )

    def _outcomes(self, configuration: Configuration, steps: int, replicate: int) -> Array:
        """Score plus the items' own difficulty, the same for all configurations, plus a little of each, mean 0."""
        drawn = np.random.default_rng([self.landscape.hash(configuration, steps, replicate), 4])
        spread = self._difficulty + 0.1 * drawn.normal(size=self.items)
        outcomes: Array = self.landscape.score(configuration, steps, replicate) + spread - spread.mean()
        return outcomes

    def test(self, evaluation: Evaluation) -> dict[str, float]:
        """The score without noise."""
        return {"score": self.landscape.true_score(evaluation.configuration, evaluation.steps)}

    @property
    def item_weights(self) -> tuple[float, ...] | None:
        """None: all items weigh the same."""
        return None

    def fingerprint(self) -> dict[str, str]:
        """The options that decide the scores."""
        options: tuple[object, ...] = (
            self.num_layers, self.landscape.seed, self.options, self.importance_noise,
            sorted(self.estimator_noise.items()), self.items, self.failures,
        )  # fmt: skip
        options += (self.options.of_settings,) if self.options.of_settings else ()
        return {"landscape": hashlib.sha256(repr(options).encode()).hexdigest()[:16]}
