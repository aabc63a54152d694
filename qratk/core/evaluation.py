"""What was measured, what was guessed, and the record of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np

from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError
from qratk.core.memory import Footprint
from qratk.core.shared import REPLICATE

MOST_SEEDS: Final = 1000
"""Seeds that configurations may choose among; higher numbers are those of replicates."""

Status = Literal["ok", "failed", "lost"]


@dataclass(frozen=True)
class FidelityLadder:
    """Optimiser steps T_1 < ... < T_S, and how many are dropped from rung to rung (eta)."""

    steps: tuple[int, ...]
    reduction_factor: float = 3.0

    def __post_init__(self) -> None:
        steps = self.steps
        if not steps or steps[0] <= 0 or any(b <= a for a, b in itertools.pairwise(steps)):
            raise ConfigurationError(f"steps must be positive and ascending, as in [100, 300, 900]; got {list(steps)}")
        if not self.reduction_factor > 1:
            raise ConfigurationError(f"the reduction factor must be over 1, got {self.reduction_factor}")

    @property
    def lowest(self) -> int:
        """T_1."""
        return self.steps[0]

    @property
    def highest(self) -> int:
        """T_S."""
        return self.steps[-1]

    def sizes(self, low: int, high: int) -> tuple[int, ...]:
        """How many of `low` candidates run at each rung, divided by eta each time, `high` at the last one."""
        sizes = [low]
        for rung in range(1, len(self.steps)):
            divided = max(high, math.ceil(low / self.reduction_factor**rung))
            sizes.append(min(sizes[-1], high if rung == len(self.steps) - 1 else divided))
        return tuple(sizes)


@dataclass(frozen=True)
class Candidate:
    """A configuration and where it comes from: operator, parents' digests, generation, phase."""

    configuration: Configuration
    origin: str
    parents: tuple[str, ...] = ()
    generation: int = 0
    phase: str = "global"


@dataclass(frozen=True)
class Request:
    """A candidate to be fine-tuned to a number of optimiser steps and scored.

    `replicate` counts runs of the same with fresh seeds, of the order of the training data and of the adapters; 0 is
    the run with the seeds that were given, which the search decides by. See `replicate_seed`.
    """

    candidate: Candidate
    steps: int
    replicate: int = 0

    @property
    def configuration(self) -> Configuration:
        """The candidate's configuration."""
        return self.candidate.configuration


@dataclass(frozen=True)
class Member:
    """A training whose adapters are averaged with those of others: a configuration's, in a replicate (0: none)."""

    configuration: Configuration
    replicate: int = 0


def mean_of(members: Iterable[Member]) -> str:
    """Name of the mean of trainings, as a journal has it."""
    return "mean of " + "; ".join(f"{member.configuration}/{member.replicate}" for member in members)


@dataclass(frozen=True)
class Evaluation:
    """A measured score after `steps` optimiser steps; larger is better, -inf unless `status` is "ok".

    "failed" is the candidate's own fault, as a loss that is not finite; "lost" the machine's, as memory that ran out: a
    resumed search measures that again.
    `outcomes` holds one figure a validation item, in the items' order; their weighted mean is the score.
    `figures` are all that the scoring said, by name: they are recorded and shown, and decide nothing.
    `checkpoint` names the stored adapter and optimiser state, relative to the run directory.
    `trained_as` is the digest of the configuration that was trained for this one, where several configurations may have
    one training in common: its steps were then trained once for all of them. None where each has its own.
    `replicate` is that of the request: 0 with the seeds that were given, else with fresh ones.
    `merged` are the trainings whose mean was scored, as adapters of this configuration; none where one alone was.
    """

    configuration: Configuration
    steps: int
    score: float
    footprint: Footprint
    outcomes: tuple[float, ...] = field(default=(), repr=False)
    seconds: float = 0.0
    status: Status = "ok"
    reason: str = ""
    checkpoint: str | None = None
    figures: Mapping[str, float] = field(default_factory=dict, repr=False, hash=False)
    trained_as: str | None = None
    replicate: int = 0
    merged: tuple[Member, ...] = ()

    def __post_init__(self) -> None:
        if self.status == "ok" and not math.isfinite(self.score):
            raise ConfigurationError(f"a score that is not finite ({self.score}) must be recorded as failed")

    @property
    def ok(self) -> bool:
        """Whether a score was measured."""
        return self.status == "ok"

    @property
    def training(self) -> str:
        """Digest that names the training: evaluations with the same one continued it, or cut it differently."""
        return self.trained_as or self.configuration.digest

    @property
    def member(self) -> Member:
        """Its training, as one of several to be averaged."""
        return Member(self.configuration, self.replicate)


def scored_as(configuration: Configuration, members: Sequence[Member] = ()) -> str:
    """Text of a configuration in test scores; a mean of trainings is told apart from one of them."""
    return f"{configuration} (mean of {len(members)} trainings)" if members else str(configuration)


@dataclass(frozen=True)
class Prediction:
    """A guess of the score at the highest rung; it is no `Evaluation`, so that it can never enter a front."""

    configuration: Configuration
    mean: float
    std: float = 0.0


@dataclass(frozen=True)
class SurrogateQuality:
    """How well scores at the highest rung are foretold, over `pairs` configurations measured at both rungs.

    `spearman` and `pearson` are of cross-validated predictions, `low_fidelity_spearman` is of the plain
    low-fidelity score; NaN where too few pairs exist.
    """

    pairs: int
    spearman: float
    pearson: float
    low_fidelity_spearman: float


def replicate_seed(seed: int, replicate: int) -> int:
    """Seed of a replicate: the given one of number 0, else 32 bits that depend on both numbers.

    They come from numpy's `SeedSequence`, spawned by the number, so that replicate 1 of seed 0 is not seed 1.
    """
    if not replicate:
        return seed
    return int(np.random.SeedSequence(seed, spawn_key=(replicate,)).generate_state(1)[0])


def seeds_of(configuration: Configuration, replicate: int = 0) -> int:
    """The `model.replicate` whose seeds a training has: the configuration's own, or in a replicate fresh ones.

    The fresh ones of a number are the same for all configurations, and none that a configuration can have.
    """
    own = configuration.settings.get(REPLICATE)
    if own is None:
        return replicate
    return MOST_SEEDS * replicate if replicate else int(own)


class History:
    """Append-only record of evaluations; at most one for each configuration and number of steps, and no replicates."""

    def __init__(self, evaluations: Iterable[Evaluation] = ()) -> None:
        self._evaluations: list[Evaluation] = []
        self._index: dict[tuple[Configuration, int], Evaluation] = {}
        for evaluation in evaluations:
            self.append(evaluation)

    def append(self, evaluation: Evaluation) -> None:
        """Add an evaluation; raises `ValueError` when that configuration was already measured at those steps."""
        key = (evaluation.configuration, evaluation.steps)
        if key in self._index:
            raise ValueError(f"{evaluation.configuration} was already evaluated at {evaluation.steps} steps")
        self._index[key] = evaluation
        self._evaluations.append(evaluation)

    def __len__(self) -> int:
        return len(self._evaluations)

    def __iter__(self) -> Iterator[Evaluation]:
        return iter(self._evaluations)

    def get(self, configuration: Configuration, steps: int) -> Evaluation | None:
        """What was measured of a configuration at a number of steps, if anything."""
        return self._index.get((configuration, steps))

    def at(self, steps: int) -> tuple[Evaluation, ...]:
        """Successful evaluations at a number of steps, in the order of measurement."""
        return tuple(e for e in self._evaluations if e.steps == steps and e.ok)

    def paired(self, low: int, high: int) -> tuple[tuple[Evaluation, Evaluation], ...]:
        """Evaluations of one configuration at both numbers of steps, in the order of the higher one."""
        pairs = ((self.get(e.configuration, low), e) for e in self.at(high))
        return tuple((a, b) for a, b in pairs if a is not None and a.ok)

    def best(self, steps: int, among: Sequence[Configuration] | None = None) -> Evaluation | None:
        """Evaluation with the largest score at a number of steps; ties go to the smaller storage."""
        pool = [e for e in self.at(steps) if among is None or e.configuration in among]
        return min(pool, key=lambda e: (-e.score, e.footprint.storage_bytes, e.configuration), default=None)
