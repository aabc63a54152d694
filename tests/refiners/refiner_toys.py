"""A small problem with known scores, simple operators, and a loop that answers a refiner's requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from qratk.core import (
    Budget,
    Configuration,
    Evaluation,
    FidelityLadder,
    History,
    Importance,
    LayerBytes,
    LayerShape,
    MemoryModel,
    Problem,
    Request,
    SearchSpace,
    Utility,
)
from qratk.mutations.base import MutationOperator
from qratk.mutations.proposer import Proposer
from qratk.refiners.base import LocalRefiner
from qratk.repairs.base import RepairPolicy

LADDER = FidelityLadder((10, 40))


class AnyStep(MutationOperator):
    """One atomic edit drawn uniformly."""

    def mutate(self, problem: Problem, configuration: Configuration, rng: np.random.Generator) -> Configuration:
        while True:
            layer, knob = int(rng.integers(problem.num_layers)), ("bits", "rank")[int(rng.integers(2))]
            child = problem.space.step(configuration, layer, knob, 1 if rng.integers(2) else -1)
            if child is not None:
                return child


class LowerLast(RepairPolicy):
    """Lowers the last layer that can be lowered, bits first."""

    def repair(self, problem: Problem, configuration: Configuration) -> Configuration:
        while not problem.feasible(configuration):
            steps = (
                problem.space.step(configuration, layer, knob, -1)
                for layer in reversed(range(problem.num_layers))
                for knob in ("bits", "rank")
            )
            configuration = next(step for step in steps if step is not None)
        return configuration


def toy_problem(num_layers: int = 3, budget_share: float = 0.6) -> Problem:
    """Problem of equal layers whose budget is a share of the largest configuration's bytes."""
    space = SearchSpace((2, 4, 8), (4, 8, 16), tuple(f"layer.{n}" for n in range(num_layers)))
    layer = LayerBytes({q: 100 * q for q in space.bits}, dict.fromkeys(space.bits, 0), {r: 8 * r for r in space.ranks})
    memory = MemoryModel(space, (layer,) * num_layers, (800,) * num_layers)
    shapes = tuple(LayerShape(name, (("proj", 20, 40),)) for name in space.layer_names)
    budget = Budget(int(budget_share * memory.bytes(space.largest)))
    rising = tuple(float(n + 1) for n in range(num_layers))
    return Problem(shapes, memory, budget, Importance(rising, rising))


def smooth_score(problem: Problem) -> Callable[[Configuration], float]:
    """Score with diminishing returns, layers of unlike weight, and bits and ranks that make up for each other."""

    def score(configuration: Configuration) -> float:
        indices = problem.space.indices(configuration).astype(float)
        weights = np.linspace(0.5, 1.5, problem.num_layers)
        gains = weights * np.sqrt(indices[:, 0]) + weights[::-1] * 0.5 * np.sqrt(indices[:, 1])
        return float((gains - 0.1 * indices[:, 0] * indices[:, 1]).sum())

    return score


@dataclass
class Bench:
    """Evaluates requests; scores at the lowest rung are the true ones less one, so that they inform perfectly."""

    problem: Problem
    score: Callable[[Configuration], float]
    ladder: FidelityLadder = LADDER
    fails: Callable[[Request], bool] = lambda request: False
    history: History = field(default_factory=History)

    def evaluate(self, configuration: Configuration, steps: int, *, failed: bool = False) -> Evaluation:
        footprint = self.problem.footprint(configuration)
        if failed:
            evaluation = Evaluation(configuration, steps, -np.inf, footprint, status="failed", reason="made to")
        else:
            penalty = 0.0 if steps == self.ladder.highest else 1.0
            evaluation = Evaluation(configuration, steps, self.score(configuration) - penalty, footprint)
        self.history.append(evaluation)
        return evaluation

    def start(self, configurations: list[Configuration]) -> Utility:
        """Measure the starting points at both rungs; the utility over them."""
        for steps in self.ladder.steps:
            for configuration in configurations:
                self.evaluate(configuration, steps)
        return Utility.over(self.history.at(self.ladder.highest), alpha=1.0)

    def step(self, refiner: LocalRefiner, rng: np.random.Generator) -> tuple[Request, ...]:
        """Ask once, measure, tell."""
        requests = refiner.ask(self.history, rng)
        if requests:
            refiner.tell([self.evaluate(r.configuration, r.steps, failed=self.fails(r)) for r in requests])
        return requests

    def run(self, refiner: LocalRefiner, rng: np.random.Generator, limit: int = 100) -> list[Request]:
        """All requests until the refiner has finished."""
        made: list[Request] = []
        for _ in range(limit):
            if refiner.finished:
                return made
            made += self.step(refiner, rng)
        raise AssertionError("the refiner did not finish")


def toy_proposer(problem: Problem) -> Proposer:
    """Proposer of uniform edits."""
    return Proposer(problem, (AnyStep(),), LowerLast())


def feasible_starts(problem: Problem, count: int, seed: int) -> list[Configuration]:
    """Different feasible configurations drawn at random."""
    rng, found = np.random.default_rng(seed), {}
    while len(found) < count:
        found[LowerLast().repair(problem, problem.space.random(rng))] = None
    return list(found)
