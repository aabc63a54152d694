"""PriorBand: Hyperband's brackets with draws from a prior and around the incumbent (Mallik et al. 2023)."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from qratk import (
    KNOBS,
    REGISTRIES,
    BracketSearcher,
    Candidate,
    Configuration,
    ConfigurationError,
    Evaluation,
    FidelityLadder,
    History,
    Proposer,
)

__all__ = ["PriorBand"]

Array = NDArray[np.float64]

TRIES = 4  # draws for one place of a bracket, before a neighbour of the last one takes it


class PriorBand(BracketSearcher):
    """Draws at random, from a prior about a center, or around the best so far (arXiv:2306.12370, section 5).

    In the bracket that begins at rung r (from 0) a candidate is drawn at random with probability 1 / (1 + eta^r), and
    else from the prior. Once a candidate has run to the highest rung, the steps of one whole bracket are spent and some
    rung has eta results, the prior's share is divided: the best 1 / eta of the highest such rung are weighted by their
    places, K for the best down to 1, and the shares of prior and incumbent are as the sums of their probabilities.

    Both distributions are products over knobs and settings: on ladders a normal distribution about the center, cut off
    at the ends, with standard deviation `deviation` of the ladder's length; a name keeps its value with probability
    1 - deviation. A draw around the incumbent changes each knob with probability `mutation_rate`.

    Args:
        offspring: candidates of the first bracket, the largest.
        center: where the prior's mode is: "importance" (bits by integer program over the importances at the rank of the
            largest uniform configuration that fits, then ranks), "uniform" (that configuration), or a configuration as
            text.
        deviation: of the prior, in (0, 1); 0.25 in the paper.
        mutation_rate: share of the knobs that a draw around the incumbent changes.
    """

    def __init__(
        self,
        offspring: int = 25,
        center: str = "importance",
        deviation: float = 0.25,
        mutation_rate: float = 0.5,
    ) -> None:
        super().__init__(offspring)
        if not 0 < deviation < 1 or not 0 < mutation_rate <= 1:
            raise ConfigurationError(
                "priorband: deviation must lie in (0, 1) and mutation_rate in (0, 1], got "
                f"{deviation} and {mutation_rate}"
            )
        self._given = None if center in ("importance", "uniform") else Configuration.from_text(center)
        self.center = center
        self.deviation = deviation
        self.mutation_rate = mutation_rate
        self._mode: Configuration | None = None

    def begin(self, proposer: Proposer, ladder: FidelityLadder) -> None:
        """Forget everything; raises `ConfigurationError` for a center off the ladders."""
        super().begin(proposer, ladder)
        if self._given is not None:
            proposer.problem.space.validate(proposer.problem.space.settled(self._given))
        self._mode = self._given or _believed(proposer, ladder, solved=self.center == "importance")

    def proposals(
        self, history: History, rng: np.random.Generator, *, size: int, known: Collection[Configuration]
    ) -> tuple[Candidate, ...]:
        """Draws from the prior and around the incumbent; the places of random ones are left to the base."""
        assert self._mode is not None, "begin comes first"
        problem, rung = self.proposer.problem, self.generation % len(self.ladder.steps)
        center = problem.space.settled(self._mode, self.leading(history))
        incumbent, shares = self.shares(history, center, rung)
        found: dict[Configuration, Candidate] = {}
        for _ in range(size):
            policy = rng.choice(3, p=shares)
            if policy == 0:
                continue
            taken = {*known, *found}
            candidate = (
                self._around(center, 1.0, "priorband:prior", taken, rng)
                if policy == 1 or incumbent is None
                else self._around(incumbent, self.mutation_rate, "priorband:incumbent", taken, rng)
            )
            if candidate is None:  # nothing new is near either: the rest is drawn at random
                break
            found[candidate.configuration] = candidate
        return tuple(found.values())

    def shares(
        self, history: History, center: Configuration, rung: int
    ) -> tuple[Configuration | None, tuple[float, float, float]]:
        """The incumbent, None where it is not drawn around yet, and the probabilities (random, prior, incumbent)."""
        at_random = 1.0 / (1.0 + self.ladder.reduction_factor**rung)
        problem, factor = self.proposer.problem, self.ladder.reduction_factor
        measured = [
            e for e in history if e.ok and e.configuration in problem.space and problem.feasible(e.configuration)
        ]
        plain = None, (at_random, 1.0 - at_random, 0.0)
        full = [steps for steps in self.ladder.steps if sum(e.steps == steps for e in measured) >= factor]
        complete = any(e.steps == self.ladder.highest for e in measured)
        if not (full and complete and steps_spent(measured) >= self.bracket_cost):
            return plain
        incumbent = _best(measured, max(e.steps for e in measured))[0].configuration
        top = _best(measured, full[-1])
        top = top[: max(1, int(len(top) / factor))]
        places = np.log(np.arange(len(top), 0, -1))
        logs = [
            np.logaddexp.reduce(places + [self._log_probability(e.configuration, mode) for e in top])
            for mode in (center, incumbent)
        ]
        of_incumbent = float(1.0 / (1.0 + np.exp(np.clip(logs[0] - logs[1], -700, 700))))
        rest = 1.0 - at_random
        return incumbent, (at_random, rest * (1.0 - of_incumbent), rest * of_incumbent)

    # Draws

    def _around(
        self, mode: Configuration, rate: float, origin: str, taken: set[Configuration], rng: np.random.Generator
    ) -> Candidate | None:
        """A new feasible draw around a mode, or else a neighbour of the last one; None when there is none either."""
        repaired = None
        for _ in range(TRIES):
            repaired = self.proposer.repaired(self._drawn(mode, rate, rng))
            if repaired is not None and repaired not in taken:
                return Candidate(repaired, origin, generation=self.generation)
        if repaired is None:
            return None
        return self.proposer.propose(repaired, rng, known=taken, generation=self.generation)

    def _drawn(self, mode: Configuration, rate: float, rng: np.random.Generator) -> Configuration:
        space = self.proposer.problem.space
        indices = space.indices(mode).copy()
        for column, knob in enumerate(KNOBS):
            tables = ladder_probabilities(len(space.ladder(knob)), self.deviation)
            for layer in np.flatnonzero(rng.random(space.num_layers) < rate):
                indices[layer, column] = rng.choice(len(tables), p=tables[indices[layer, column]])
        places = space.shared_indices(mode).copy()
        for column, ladder in enumerate(space.shared):
            if rng.random() < rate:
                table = self._setting(ladder.ordinal, len(ladder.values))
                places[column] = rng.choice(len(table), p=table[places[column]])
        return space.from_indices(indices, space.shared_at(places))

    def _log_probability(self, configuration: Configuration, mode: Configuration) -> float:
        space, total = self.proposer.problem.space, 0.0
        found, center = space.indices(configuration), space.indices(mode)
        for column, knob in enumerate(KNOBS):
            table = ladder_probabilities(len(space.ladder(knob)), self.deviation)
            total += float(np.log(table[center[:, column], found[:, column]]).sum())
        pairs = zip(space.shared, space.shared_indices(mode), space.shared_indices(configuration), strict=True)
        for ladder, here, there in pairs:
            total += float(np.log(self._setting(ladder.ordinal, len(ladder.values))[here, there]))
        return total

    def _setting(self, ordinal: bool, size: int) -> Array:
        if ordinal or size == 1:
            return ladder_probabilities(size, self.deviation)
        table = np.full((size, size), self.deviation / (size - 1))
        np.fill_diagonal(table, 1.0 - self.deviation)
        return table


def ladder_probabilities(rungs: int, deviation: float) -> Array:
    """Probability of each rung (columns) about each center (rows), (rungs, rungs).

    Each rung has an equal part of [0, 1], and the normal distribution about the middle of the center's is cut off at
    the ends.
    """
    from scipy.special import ndtr

    edges = np.linspace(0.0, 1.0, rungs + 1)
    middles = (edges[:-1] + edges[1:]) / 2
    below = ndtr((edges[None, :] - middles[:, None]) / deviation)
    parts = np.diff(below, axis=1)
    return np.asarray(parts / parts.sum(axis=1, keepdims=True), dtype=np.float64)


def steps_spent(measured: Sequence[Evaluation]) -> int:
    """Optimiser steps of all trainings, each continued from rung to rung."""
    reached: dict[str, int] = {}
    for evaluation in measured:
        reached[evaluation.training] = max(reached.get(evaluation.training, 0), evaluation.steps)
    return sum(reached.values())


def _best(measured: Sequence[Evaluation], steps: int) -> list[Evaluation]:
    """What was measured at a rung, best first."""
    return sorted((e for e in measured if e.steps == steps), key=lambda e: -e.score)


def _believed(proposer: Proposer, ladder: FidelityLadder, *, solved: bool) -> Configuration:
    """The largest uniform configuration that fits, or what integer programs make of its rank."""
    problem = proposer.problem
    fitting = [c for c in problem.space.uniforms() if problem.feasible(c)]
    largest = max(fitting, key=problem.bytes, default=problem.space.smallest)
    if not solved:
        return largest.with_shared(())
    decoupled = REGISTRIES["searchers"].create("decoupled", rank_floor=largest.ranks[0])
    decoupled.begin(proposer, ladder)
    found = decoupled.ask(History(), np.random.default_rng(0))
    return found[0].configuration if found else largest.with_shared(())
