"""The documents of a run folder, typed: to plain data and back, with one format and checks.

The names of the fields are the keys of the files. Figures that are not finite are null there, and NaN here.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import numpy as np
import yaml

from qratk.core.configuration import Configuration
from qratk.core.effort import Effort
from qratk.core.errors import ConfigurationError, RunDirectoryError
from qratk.core.evaluation import Evaluation, Member, Status, SurrogateQuality, scored_as
from qratk.core.memory import Budget, Scope
from qratk.core.pareto import ParetoFront
from qratk.core.plain import plain, typed
from qratk.core.problem import Problem
from qratk.core.result import Comparison, Confirmed, GenerationSummary, RefinementSummary, SearchPlan, SearchResult
from qratk.core.text import clean
from qratk.core.utility import Utility
from qratk.run.environment import Environment

FORMAT: Final = 1
"""Of `result.json`; files without one are of format 1."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class EvaluationEntry:
    """One evaluation; `bytes` are those of the budget's scope, the score is NaN when it failed.

    `figures` are all that the scoring said, by name. `replicate` counts runs with fresh seeds; 0 is the search's own.
    `merged` are the trainings whose mean was scored; none where one alone was.
    """

    configuration: Configuration
    digest: str
    steps: int
    score: float
    bytes: int
    fits: bool
    storage_bytes: int
    training_bytes: int
    serving_bytes: int
    fixed_bytes: int
    average_bits: float
    average_rank: float
    seconds: float
    status: Status
    reason: str
    checkpoint: str | None
    figures: Mapping[str, float] = field(default_factory=dict)
    replicate: int = 0
    merged: tuple[Member, ...] = ()

    def __post_init__(self) -> None:
        if self.digest != self.configuration.digest:
            raise ConfigurationError(f"the digest {self.digest!r} is not that of {self.configuration}")

    @classmethod
    def of(cls, problem: Problem, evaluation: Evaluation) -> EvaluationEntry:
        """The entry of an evaluation."""
        configuration = evaluation.configuration
        return cls(
            configuration=configuration,
            digest=configuration.digest,
            steps=evaluation.steps,
            score=evaluation.score,
            bytes=evaluation.footprint.bytes(problem.budget.scope),
            fits=problem.fits(evaluation),
            storage_bytes=evaluation.footprint.storage_bytes,
            training_bytes=evaluation.footprint.training_bytes,
            serving_bytes=evaluation.footprint.serving_bytes,
            fixed_bytes=evaluation.footprint.fixed,
            average_bits=problem.memory.average_bits(configuration),
            average_rank=problem.memory.average_rank(configuration),
            seconds=evaluation.seconds,
            status=evaluation.status,
            reason=clean(evaluation.reason),
            checkpoint=evaluation.checkpoint,
            figures=dict(evaluation.figures),
            replicate=evaluation.replicate,
            merged=evaluation.merged,
        )


@dataclass(frozen=True, kw_only=True)
class FrontDocument:
    """`front.json`: the measured front by ascending bytes, at the highest rung (`steps`)."""

    scope: Scope
    limit_bytes: int
    steps: int
    evaluations: tuple[EvaluationEntry, ...]

    @classmethod
    def of(cls, plan: SearchPlan, front: ParetoFront) -> FrontDocument:
        """The document of a front."""
        return cls(
            scope=front.scope,
            limit_bytes=plan.problem.budget.limit_bytes,
            steps=plan.ladder.highest,
            evaluations=tuple(EvaluationEntry.of(plan.problem, e) for e in front.evaluations),
        )


@dataclass(frozen=True, kw_only=True)
class ComparisonEntry:
    """The best minus a baseline, with the interval of the difference, over validation items or over fresh seeds."""

    baseline: EvaluationEntry
    difference: float
    low: float
    high: float
    confidence: float
    over: Literal["items", "seeds"] = "items"

    @classmethod
    def of(cls, problem: Problem, comparison: Comparison) -> ComparisonEntry:
        """The entry of a comparison."""
        return cls(
            baseline=EvaluationEntry.of(problem, comparison.baseline),
            difference=comparison.difference,
            low=comparison.low,
            high=comparison.high,
            confidence=comparison.confidence,
            over=comparison.over,
        )


@dataclass(frozen=True, kw_only=True)
class ConfirmedEntry:
    """A contender run again with fresh seeds: the mean score of the replicates alone, and its interval over seeds.

    `selected` is the evaluation that the search chose it by, which is not in the mean. The mean is NaN where a
    replicate failed.
    """

    selected: EvaluationEntry
    replicates: tuple[EvaluationEntry, ...]
    mean: float
    low: float
    high: float
    confidence: float

    @classmethod
    def of(cls, problem: Problem, confirmed: Confirmed) -> ConfirmedEntry:
        """The entry of a confirmation."""
        return cls(
            selected=EvaluationEntry.of(problem, confirmed.selected),
            replicates=tuple(EvaluationEntry.of(problem, e) for e in confirmed.replicates),
            mean=confirmed.mean,
            low=confirmed.low,
            high=confirmed.high,
            confidence=confirmed.confidence,
        )


@dataclass(frozen=True, kw_only=True)
class GenerationEntry:
    """How a generation ended; `surrogate` is None where none was judged."""

    generation: int
    hypervolume: float
    relative_progress: float
    front_size: int
    best_score: float | None
    surrogate: SurrogateQuality | None
    surrogate_used: bool
    seconds: float

    @classmethod
    def of(cls, summary: GenerationSummary) -> GenerationEntry:
        """The entry of a summary."""
        return cls(
            generation=summary.number,
            hypervolume=summary.hypervolume,
            relative_progress=summary.relative_progress,
            front_size=len(summary.front),
            best_score=None if summary.best is None else summary.best.score,
            surrogate=summary.surrogate,
            surrogate_used=summary.surrogate_used,
            seconds=summary.seconds,
        )


@dataclass(frozen=True, kw_only=True)
class RefinementEntry:
    """How a step of the local phase ended."""

    step: int
    best_score: float | None
    improved: bool
    diagnostics: Mapping[str, float]
    seconds: float

    @classmethod
    def of(cls, summary: RefinementSummary) -> RefinementEntry:
        """The entry of a summary."""
        return cls(
            step=summary.number,
            best_score=None if summary.best is None else summary.best.score,
            improved=summary.improved,
            diagnostics=dict(summary.diagnostics),
            seconds=summary.seconds,
        )


@dataclass(frozen=True, kw_only=True)
class UtilityEntry:
    """The utility that the answer was chosen by, and what the best has of it."""

    alpha: float
    scores: tuple[float, float]
    bytes: tuple[float, float]
    scope: Scope
    best: float

    @classmethod
    def of(cls, utility: Utility, best: Evaluation) -> UtilityEntry:
        """The entry of a utility."""
        return cls(
            alpha=utility.alpha,
            scores=utility.scores,
            bytes=utility.bytes,
            scope=utility.scope,
            best=utility.of(best),
        )


@dataclass(frozen=True, kw_only=True)
class ImportanceEntry:
    """Raw importance of the layers, (L,) each."""

    bits: tuple[float, ...]
    rank: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class ProblemEntry:
    """What was searched; `shared` are the ladders of shared settings by name.

    `parameters` are the layers' weights, (L,), which weigh the average bits; empty if unknown. `proxy` is what the
    lowest rung scores by in place of a training, "" where it trains; `shared_runs` are trained for all together.
    """

    layers: tuple[str, ...]
    bits: tuple[int, ...]
    ranks: tuple[int, ...]
    log10_configurations: float
    limit_bytes: int
    scope: Scope
    max_average_bits: float | None
    fixed_bytes: int
    importance: ImportanceEntry
    steps: tuple[int, ...]
    reduction_factor: float
    resumed: int
    parameters: tuple[int, ...] = ()
    shared: Mapping[str, tuple[bool | int | float | str, ...]] = field(default_factory=dict)
    proxy: str = ""
    shared_runs: int = 0

    @classmethod
    def of(cls, plan: SearchPlan) -> ProblemEntry:
        """The entry of a plan's problem."""
        problem = plan.problem
        return cls(
            layers=problem.space.layer_names,
            bits=problem.space.bits,
            ranks=problem.space.ranks,
            log10_configurations=problem.space.log10_size,
            limit_bytes=problem.budget.limit_bytes,
            scope=problem.budget.scope,
            max_average_bits=problem.budget.max_average_bits,
            fixed_bytes=problem.memory.fixed_bytes,
            importance=ImportanceEntry(bits=problem.importance.bits, rank=problem.importance.rank),
            steps=plan.ladder.steps,
            reduction_factor=plan.ladder.reduction_factor,
            resumed=plan.resumed,
            parameters=problem.memory.parameters,
            shared={ladder.name: ladder.values for ladder in problem.space.shared},
            proxy=plan.proxy,
            shared_runs=plan.shared_runs,
        )

    @cached_property
    def budget(self) -> Budget:
        """The limits; without the cap on average bits where the layers' weights are unknown."""
        return Budget(self.limit_bytes, self.scope, self.max_average_bits if self.parameters else None)

    def effort(self, *, shared: bool = True) -> Effort:
        """The steps trained before the first candidate: none, or those of the shared runs, if they are to count."""
        return Effort(self.steps[-1], self.steps[0] if self.proxy else None, self.shared_runs if shared else 0)

    def fits(self, evaluation: Evaluation) -> bool:
        """Whether what was measured is within the budget."""
        average = float(np.average(evaluation.configuration.bits, weights=self.parameters)) if self.parameters else 0.0
        return self.budget.excess(evaluation.footprint.bytes(self.scope), average) == 0.0


@dataclass(frozen=True, kw_only=True)
class ResultDocument:
    """`result.json`: what a search ended with.

    `test_scores` are by configuration and metric, `evaluations_by_rung` counts failed ones too, `proposals` counts by
    what became of them, some of them layer by layer. `confirmations` are the contenders that were run again with fresh
    seeds, the largest mean first. `single` is the best training alone, where `best` is the mean of several, and
    `averages` is how many means were scored.
    """

    name: str
    best: EvaluationEntry
    baselines: tuple[EvaluationEntry, ...]
    references: tuple[EvaluationEntry, ...]
    comparisons: tuple[ComparisonEntry, ...]
    test_scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    front: FrontDocument
    stop_reasons: Mapping[str, str] = field(default_factory=dict)
    hypervolume_by_generation: tuple[float, ...] = ()
    generations: tuple[GenerationEntry, ...] = ()
    refinements: tuple[RefinementEntry, ...] = ()
    evaluations_by_rung: Mapping[int, int] = field(default_factory=dict)
    failed_evaluations: int
    item_weights: tuple[float, ...] | None = None
    top3_hit_rates: Mapping[str, float] = field(default_factory=dict)
    proposals: Mapping[str, int | tuple[int, ...]] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    utility: UtilityEntry | None = None
    problem: ProblemEntry
    environment: Environment = field(default_factory=Environment)
    confirmations: tuple[ConfirmedEntry, ...] = ()
    single: EvaluationEntry | None = None
    averages: int = 0
    format: int = FORMAT

    @classmethod
    def of(cls, result: SearchResult) -> ResultDocument:
        """The document of a search that has ended here."""
        plan, problem = result.plan, result.plan.problem
        return cls(
            name=clean(plan.name),
            best=EvaluationEntry.of(problem, result.best),
            baselines=tuple(EvaluationEntry.of(problem, e) for e in result.baselines),
            references=tuple(EvaluationEntry.of(problem, e) for e in result.references),
            comparisons=tuple(ComparisonEntry.of(problem, c) for c in result.comparisons),
            test_scores=result.test_scores,
            front=FrontDocument.of(plan, result.front),
            stop_reasons={phase: clean(reason) for phase, reason in result.stop_reasons.items()},
            hypervolume_by_generation=tuple(summary.hypervolume for summary in result.generations),
            generations=tuple(GenerationEntry.of(summary) for summary in result.generations),
            refinements=tuple(RefinementEntry.of(summary) for summary in result.refinements),
            evaluations_by_rung=_by_rung(result),
            failed_evaluations=sum(not record.evaluation.ok for record in result.records),
            item_weights=result.item_weights,
            top3_hit_rates=result.top3_hit_rates,
            proposals={k: v if isinstance(v, int) else tuple(v) for k, v in result.proposals.items()},
            seconds=result.seconds,
            utility=UtilityEntry.of(result.utility, result.best),
            problem=ProblemEntry.of(plan),
            environment=Environment.here(),
            confirmations=tuple(ConfirmedEntry.of(problem, c) for c in result.confirmations),
            single=None if result.single is None else EvaluationEntry.of(problem, result.single),
            averages=result.averages,
        )

    @property
    def confirmed(self) -> ConfirmedEntry | None:
        """What fresh seeds say of the best; None where it was not confirmed."""
        own = (c for c in self.confirmations if c.selected.configuration == self.best.configuration)
        return next((c for c in own if np.isfinite(c.mean)), None)

    def tested(self, entry: EvaluationEntry) -> Mapping[str, float]:
        """Test scores of an evaluation by metric, those that are known; empty where it was not tested."""
        found = self.test_scores.get(scored_as(entry.configuration, entry.merged), {})
        return {name: value for name, value in found.items() if np.isfinite(value)}


def _by_rung(result: SearchResult) -> dict[int, int]:
    counts = Counter(evaluation.steps for evaluation in result.history)
    return {steps: counts[steps] for steps in sorted({*result.plan.ladder.steps, *counts})}


@dataclass(frozen=True)
class Component:
    """A component as settings name it: its registered name or import path, and its options."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """`config.yaml`: all settings of a run, as plain data."""

    document: Mapping[str, Any]

    def section(self, name: str) -> Mapping[str, Any]:
        """Settings of a section, such as "search"; empty where there is none."""
        found = self.document.get(name)
        return found if isinstance(found, Mapping) else {}

    def component(self, slot: str) -> Component | None:
        """The component in a slot of the search that takes one, such as "searcher"; None where it was not stated."""
        given = self.section("search").get(slot)
        if isinstance(given, str):
            return Component(given)
        if not isinstance(given, Mapping) or "class_path" not in given:
            return None
        return Component(str(given["class_path"]), given.get("init_args") or {})


def to_json(document: object) -> str:
    """Strict JSON of any plain data or document."""
    return json.dumps(plain(document), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def read_result(path: Path) -> ResultDocument:
    """A `result.json`; raises `RunDirectoryError` when it is missing, damaged or of another make."""
    return read_document(ResultDocument, path)


def read_front(path: Path) -> FrontDocument:
    """A `front.json`; raises `RunDirectoryError` when it is missing, damaged or of another make."""
    return read_document(FrontDocument, path)


def read_settings(path: Path) -> Settings:
    """Settings in a YAML file; raises `RunDirectoryError`."""
    try:
        found = yaml.load(_text(path), Loader=_LOADER)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, RunDirectoryError):
            raise
        raise RunDirectoryError(f"{path} is damaged, or no file of settings: {_first_line(error)}") from error
    if not isinstance(found, Mapping):
        raise RunDirectoryError(f"{path} holds no settings; they are given by name, as in 'search: {{...}}'")
    return Settings(found)


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_document(kind: type[T], path: Path) -> T:
    """A JSON file as a dataclass; raises `RunDirectoryError` when it is missing, damaged or of another make."""
    found = read_json(path)
    version = found.get("format", 1) if isinstance(found, Mapping) else 1
    if isinstance(version, int) and version > FORMAT:
        raise RunDirectoryError(f"{path} is of format {version}, and this qratk reads up to {FORMAT}: update qratk")
    try:
        return typed(kind, found, path.name)
    except ConfigurationError as error:
        raise _foreign(path, error) from error


def read_json(path: Path) -> object:
    """What a JSON file holds; raises `RunDirectoryError` when it is missing or damaged."""
    text = _text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _foreign(path, error) from error


def _foreign(path: Path, why: Exception) -> RunDirectoryError:
    return RunDirectoryError(f"{path} is damaged, or was not written by qratk: {_first_line(why)}")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RunDirectoryError(f"{path} is missing") from None
    except OSError as error:
        raise RunDirectoryError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise _foreign(path, error) from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
