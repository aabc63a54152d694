"""What a search reports while it runs and when it has ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from qratk.core.configuration import Configuration
from qratk.core.effort import Effort
from qratk.core.evaluation import Candidate, Evaluation, FidelityLadder, History, SurrogateQuality
from qratk.core.pareto import ParetoFront
from qratk.core.problem import Problem
from qratk.core.utility import Utility


@dataclass(frozen=True)
class SearchPlan:
    """What is known before the first evaluation: the problem, the rungs, and how many evaluations there may be.

    `evaluations` maps a rung (steps) to the largest number of evaluations that the search will make there. `proxy` is
    what the lowest rung scores by in place of a training, "" where it trains; `shared_runs` are full runs that are
    trained for all candidates together.
    """

    name: str
    problem: Problem
    ladder: FidelityLadder
    evaluations: Mapping[int, int]
    baselines: tuple[Configuration, ...]
    resumed: int = 0
    proxy: str = ""
    shared_runs: int = 0

    @property
    def effort(self) -> Effort:
        """The steps that were trained by now: none but those of the shared runs."""
        return Effort(self.ladder.highest, self.ladder.lowest if self.proxy else None, self.shared_runs)


@dataclass(frozen=True)
class Record:
    """One evaluation with its candidate, in the order of measurement (`index` from 0)."""

    index: int
    candidate: Candidate
    evaluation: Evaluation

    @property
    def searched(self) -> bool:
        """Whether the search decided by it: it is neither a reference nor a replicate with a fresh seed."""
        return self.candidate.phase != "reference" and not self.evaluation.replicate


@dataclass(frozen=True)
class Progress:
    """Where the search stands: for the live view. `seconds_left` is an upper bound; None before it is known."""

    phase: str
    generation: int
    rung: int
    done: int
    planned: int
    best: Evaluation | None
    seconds: float
    seconds_left: float | None


@dataclass(frozen=True)
class GenerationSummary:
    """How a generation of the global phase ended."""

    number: int
    front: ParetoFront
    hypervolume: float
    relative_progress: float
    best: Evaluation | None
    surrogate: SurrogateQuality | None
    surrogate_used: bool
    seconds: float


@dataclass(frozen=True)
class RefinementSummary:
    """How one step of the local phase ended; `diagnostics` holds the refiner's scalars."""

    number: int
    best: Evaluation | None
    improved: bool
    diagnostics: Mapping[str, float]
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """Difference in score of the best to a baseline, with an interval.

    `over` says of what: of the validation items, by a paired bootstrap, or of fresh seeds, by Student's t of the
    differences paired by seed; the difference is then the mean of these.
    """

    baseline: Evaluation
    difference: float
    low: float
    high: float
    confidence: float = 0.95
    over: Literal["items", "seeds"] = "items"


@dataclass(frozen=True)
class Confirmed:
    """A contender for the answer, run again at the highest rung with fresh seeds.

    `selected` is the evaluation that the search chose it by. `mean` is the mean score of the `replicates` alone: of
    many noisy scores the largest is too large (the winner's curse), and `selected` is one of those. `low` and `high`
    bound it over seeds by Student's t, NaN with a single one. The mean is -inf where a replicate failed by its own
    fault, and NaN where none was measured.
    """

    selected: Evaluation
    replicates: tuple[Evaluation, ...]
    mean: float
    low: float
    high: float
    confidence: float = 0.95

    @property
    def configuration(self) -> Configuration:
        """The contender."""
        return self.selected.configuration

    @property
    def scores(self) -> tuple[float, ...]:
        """Score of each replicate that was measured."""
        return tuple(e.score for e in self.replicates if e.ok)

    @property
    def delivered(self) -> Evaluation:
        """Of all trainings of the contender the one with the best score, whose adapter is the one to take.

        Its score is one of several chosen by validation items; `mean` is what the configuration is worth.
        """
        return max((self.selected, *(e for e in self.replicates if e.ok)), key=lambda e: e.score)


@dataclass(frozen=True)
class SearchResult:
    """What a search ended with; every evaluation in it was measured.

    `item_weights` are those of the validation items in the score; None when all are equal. `confirmations` are the
    contenders that were run again with fresh seeds, the largest mean first; the configuration of `best` is then chosen
    by these means, and `best` is the best of its trainings. Where several were averaged, `best` has the score of their
    mean, and `single` is the best of them alone; `averages` is how many means were scored on the way.
    """

    plan: SearchPlan
    best: Evaluation
    front: ParetoFront
    baselines: tuple[Evaluation, ...]
    references: tuple[Evaluation, ...]
    comparisons: tuple[Comparison, ...]
    history: History
    records: tuple[Record, ...]
    generations: tuple[GenerationSummary, ...]
    refinements: tuple[RefinementSummary, ...]
    stop_reasons: Mapping[str, str]
    utility: Utility
    seconds: Mapping[str, float]
    test_scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    proposals: Mapping[str, int | Sequence[int]] = field(default_factory=dict)
    top3_hit_rates: Mapping[str, float] = field(default_factory=dict)
    item_weights: tuple[float, ...] | None = None
    confirmations: tuple[Confirmed, ...] = ()
    single: Evaluation | None = None
    averages: int = 0

    @property
    def confirmed(self) -> Confirmed | None:
        """What fresh seeds say of the best; None without confirmation, or where all of it was lost."""
        own = (c for c in self.confirmations if c.configuration == self.best.configuration)
        return next((c for c in own if c.scores), None)
