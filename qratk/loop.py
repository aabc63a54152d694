"""The search: baselines, a global phase, a local phase, an answer (AutoQRA).

`SearchLoop` holds the settings; one `_Search` is one run of them. The loop knows strategies only by their contracts. It
is resumed by running it again: the journal answers what was measured and decided before (see `qratk.run.journal`).
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qratk.core import answer
from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError, SearchError
from qratk.core.evaluation import Candidate, Evaluation, FidelityLadder, History, Request, SurrogateQuality
from qratk.core.memory import Budget, MemoryModel, Scope, format_bytes, resolve_budget
from qratk.core.pareto import ParetoFront, fronts
from qratk.core.plain import request_data, request_of
from qratk.core.problem import Importance, Problem
from qratk.core.result import GenerationSummary, Progress, Record, RefinementSummary, SearchPlan, SearchResult
from qratk.core.space import SearchSpace
from qratk.core.utility import Utility
from qratk.estimators.base import ImportanceEstimator
from qratk.evaluators.base import EvaluationContext, Evaluator
from qratk.mutations.base import MutationOperator
from qratk.mutations.proposer import Proposer
from qratk.refiners.base import LocalRefiner
from qratk.repairs.base import RepairPolicy
from qratk.reporting.base import Reporter
from qratk.run.journal import Comparable, Journal
from qratk.searchers.base import GlobalSearcher
from qratk.statistics import paired_comparison, top3_hit_rates
from qratk.surrogates.base import PromotionSurrogate


class SearchLoop:
    """Searches bits and ranks of every layer under a budget.

    Args:
        evaluator: fine-tunes and scores a configuration.
        searcher: global searcher (phase I).
        refiner: local refiner (phase II).
        surrogate: decides which short runs are continued.
        mutations: operators that vary a configuration, drawn in equal parts.
        repair: brings a configuration back under the budget.
        bits_importance: scores layers for their bit-width, I_q.
        rank_importance: scores layers for their rank, I_r.
        bits: ladder of bit-widths; 16 keeps a layer in 16 bits.
        ranks: ladder of adapter ranks; 0 means no adapter.
        limit: budget as a size with a unit, as in "5.5GiB".
        like: budget as what a uniform [bits, rank] takes, on or off the ladders, as in [4, 16].
        scope: which bytes the budget limits: storage (Eq. 21), training or serving peak.
        max_average_bits: cap on the mean bit-width over weights, beside or instead of bytes.
        steps: optimiser steps of the rungs, T_1 < ... < T_S.
        multi_fidelity: whether the lower rungs are used; without them every candidate runs to T_S at once.
        reduction_factor: eta, how many candidates are dropped from rung to rung.
        high_fidelity_candidates: N_HF, how many of a generation reach T_S.
        promotion: whether the best of each generation go on to higher rungs ("each"), or once, after the last
            generation, the best of them all ("last": phase I then judges by T_1 alone).
        promote_by: what is best: the predicted or measured score, or the front of score and bytes.
        uniform_baselines: whether the uniform configurations that fit are measured too, first and at every rung; only
            then is the answer known to be no worse than they are.
        max_evaluations: cap on the evaluations at T_S in both phases, baselines included.
        generations: cap on the generations of phase I.
        hypervolume_tolerance: epsilon_hv; phase I stops when the hypervolume grows by less, relatively,
        hypervolume_patience: for this many generations in a row (Eq. 28).
        alpha: weight of the score against bytes in the utility of phase II and of the answer (Eq. 4). The budget is
            a hard limit already, so by default (1) the answer is what scores best within it.
        references: uniform [bits, rank] pairs measured for comparison only, on or off the ladders, as in [[16, 16]].
        test: whether the best, the baselines and the references are scored on test data after the search.
        seed: seed of every random choice of the search.
        name: name of the run.
    """

    def __init__(
        self,
        *,
        evaluator: Evaluator,
        searcher: GlobalSearcher,
        refiner: LocalRefiner,
        surrogate: PromotionSurrogate,
        mutations: list[MutationOperator],
        repair: RepairPolicy,
        bits_importance: ImportanceEstimator,
        rank_importance: ImportanceEstimator,
        bits: Sequence[int] = (2, 4, 8),
        ranks: Sequence[int] = (4, 8, 16),
        limit: str | None = None,
        like: Sequence[int] | None = None,
        scope: Scope = "storage",
        max_average_bits: float | None = None,
        steps: Sequence[int] = (100, 300, 900),
        multi_fidelity: bool = True,
        reduction_factor: float = 3.0,
        high_fidelity_candidates: int = 3,
        promotion: Literal["each", "last"] = "each",
        promote_by: Literal["score", "front"] = "score",
        uniform_baselines: bool = True,
        max_evaluations: int | None = None,
        generations: int = 12,
        hypervolume_tolerance: float = 1e-3,
        hypervolume_patience: int = 3,
        alpha: float = 1.0,
        references: Sequence[Sequence[int]] = (),
        test: bool = True,
        seed: int = 0,
        name: str = "search",
    ) -> None:
        if generations < 0 or high_fidelity_candidates < 1 or hypervolume_patience < 1:
            raise ConfigurationError(
                "generations must be at least 0, high_fidelity_candidates and hypervolume_patience at least 1; got "
                f"{generations}, {high_fidelity_candidates} and {hypervolume_patience}"
            )
        if max_evaluations is not None and max_evaluations < 1:
            raise ConfigurationError(f"max_evaluations must be at least 1, got {max_evaluations}")
        if promotion not in ("each", "last") or promote_by not in ("score", "front"):
            raise ConfigurationError(
                f"promotion must be 'each' or 'last' and promote_by 'score' or 'front', got {promotion!r} and "
                f"{promote_by!r}"
            )
        if not 0.0 <= alpha <= 1.0:
            raise ConfigurationError(f"alpha must lie in [0, 1], got {alpha}")
        self.evaluator = evaluator
        self.searcher = searcher
        self.refiner = refiner
        self.surrogate = surrogate
        self.mutations = tuple(mutations)
        self.repair = repair
        self.bits_importance = bits_importance
        self.rank_importance = rank_importance
        self.bits = tuple(bits)
        self.ranks = tuple(ranks)
        self.limit = limit
        self.like = like
        self.scope: Scope = scope
        self.max_average_bits = max_average_bits
        ladder = FidelityLadder(tuple(steps), reduction_factor)
        self.ladder = ladder if multi_fidelity else FidelityLadder(ladder.steps[-1:], reduction_factor)
        self.high_fidelity_candidates = high_fidelity_candidates
        self.promotion = promotion
        self.promote_by = promote_by
        self.uniform_baselines = uniform_baselines
        self.max_evaluations = max_evaluations
        self.generations = generations
        self.hypervolume_tolerance = hypervolume_tolerance
        self.hypervolume_patience = hypervolume_patience
        self.alpha = alpha
        self.references = tuple(Configuration.of([int(bits)], [int(rank)]).layers[0] for bits, rank in references)
        self.test = test
        self.seed = seed
        self.name = name

    def planned_evaluations(self, baselines: int) -> dict[int, int]:
        """Largest number of evaluations at each rung (steps), given how many uniform configurations fit."""
        highest = self.ladder.highest
        counts = Counter(dict.fromkeys(self.ladder.steps, baselines if self.uniform_baselines else 0))
        phases = [self.searcher.planned_evaluations(self.ladder, self.high_fidelity_candidates, self.generations)]
        if self.promotion == "last":
            (lowest, _), *higher = self._schedule_of_the_last()
            phases = [{lowest: self.generations * self.searcher.generation_size}, dict(higher)]
        for phase in (*phases, self.refiner.planned_evaluations(self.ladder)):
            counts.update(phase)
        if self.max_evaluations is not None:
            counts[highest] = min(counts[highest], self.max_evaluations)
        counts[highest] += len(self.references)
        return dict(sorted(counts.items()))

    def _schedule_of_the_last(self) -> tuple[tuple[int, int], ...]:
        """Rungs and sizes of the one race after phase I: that of a single generation."""
        sizes = self.ladder.sizes(self.searcher.generation_size, self.high_fidelity_candidates)
        return tuple(zip(self.ladder.steps, sizes, strict=True))

    def pose(
        self, names: Sequence[str], memory_model: Callable[[SearchSpace], MemoryModel]
    ) -> tuple[MemoryModel, Budget]:
        """Bytes and budget over the layers with these names. Raises `ConfigurationError` or `InfeasibleBudgetError`."""
        limit, like = self.limit, self.like
        if like is not None and len(like) == 2 and not (like[0] in self.bits and like[1] in self.ranks):
            if limit is not None:
                raise ConfigurationError(
                    "state the budget once: either a size ('limit') or a uniform configuration ('like')"
                )
            one = memory_model(SearchSpace((int(like[0]),), (int(like[1]),), tuple(names)))
            limit, like = str(one.bytes(one.space.smallest, self.scope)), None
        memory = memory_model(SearchSpace(self.bits, self.ranks, tuple(names)))
        return memory, resolve_budget(
            memory, limit=limit, like=like, scope=self.scope, max_average_bits=self.max_average_bits
        )

    def run(
        self,
        *,
        run_dir: Path,
        reporter: Reporter,
        config: Mapping[str, Any],
        comparable: Comparable = dict,
        module: Any = None,
        datamodule: Any = None,
        trainer: Any = None,
    ) -> SearchResult:
        """What the search found; every measurement is in `run_dir` before the next begins.

        Args:
            run_dir: a new directory, or that of an interrupted search with the same `config`, which is resumed.
            reporter: is told what happens.
            config: plain data that decides the outcome; a run directory is resumed only on an equal one.
            comparable: the form in which settings by dotted key, stored and given, are compared.
            module, datamodule, trainer: handed on to the evaluator.

        Raises `RunDirectoryError`, `InfeasibleBudgetError`, or `SearchError` when nothing could be measured.
        """
        with Journal(run_dir) as journal:
            journal.bind("config", config, comparable=comparable)
            context = EvaluationContext(
                run_dir,
                self.ladder,
                self.seed,
                module,
                datamodule,
                trainer,
                reference_bits=tuple(sorted({reference.bits for reference in self.references} - set(self.bits))),
                reference_ranks=tuple(sorted({reference.rank for reference in self.references})),
                say=reporter.message,
                decided=journal.decided,
            )
            return _Search(self, journal, reporter, context).run()


class _Search:
    """One run: state that grows while it goes on."""

    def __init__(self, settings: SearchLoop, journal: Journal, reporter: Reporter, context: EvaluationContext) -> None:
        self.settings = settings
        self.journal = journal
        self.reporter = reporter
        self.context = context
        self.ladder = settings.ladder
        self.history = History()
        self.records: list[Record] = []
        self.generations: list[GenerationSummary] = []
        self.refinements: list[RefinementSummary] = []
        self.stop_reasons = {"global": "no generation was asked for", "local": "not started"}
        self.seconds: Counter[str] = Counter()
        self.started = time.monotonic()
        self._known_best: tuple[Any, Evaluation | None] | None = None  # with what it depends on
        self.phase, self.generation, self.discarded = "baseline", 0, set[tuple[Configuration, int]]()

    def run(self) -> SearchResult:
        with self._timed("setup"):
            self.settings.evaluator.open(self.context)
            self.journal.bind("content", self.settings.evaluator.fingerprint())
        self.problem = self._pose()
        self.proposer = Proposer(self.problem, self.settings.mutations, self.settings.repair)
        fitting = [c for c in self.problem.space.uniforms() if self.problem.feasible(c)]
        self.baselines = fitting if self.settings.uniform_baselines else []
        planned = self.settings.planned_evaluations(len(self.baselines))
        self.plan = SearchPlan(
            self.settings.name, self.problem, self.ladder, planned, tuple(self.baselines), len(self.journal)
        )
        self.reporter.started(self.plan)
        self._measure_baselines()
        self._explore()
        if self.settings.promotion == "last":
            self._promote_last()
        self._refine()
        return self._conclude()

    # The problem

    def _pose(self) -> Problem:
        evaluator = self.settings.evaluator
        memory, budget = self.settings.pose([shape.name for shape in evaluator.shapes], evaluator.memory_model)
        if not budget.check(memory):
            self.reporter.message(
                f"The budget of {format_bytes(budget.limit_bytes)} never binds: the largest configuration takes "
                f"{format_bytes(memory.bytes(memory.space.largest, budget.scope))}."
            )
        return Problem(evaluator.shapes, memory, budget, self._importance(memory.space))

    def _importance(self, space: SearchSpace) -> Importance:
        def measure() -> dict[str, list[float]]:
            with self._timed("importance"):
                evaluator, settings = self.settings.evaluator, self.settings
                bits = evaluator.importance(settings.bits_importance, space)
                rank = evaluator.importance(settings.rank_importance, space)
            return {"bits": bits.tolist(), "rank": rank.tolist()}

        scores = self.journal.decided("importance", measure)
        return Importance(tuple(scores["bits"]), tuple(scores["rank"]))

    # Measuring

    def _measure_baselines(self) -> None:
        """Uniform configurations that fit, on every rung: the promise never to be worse, and the first pairs."""
        candidates = [Candidate(c, "uniform", phase="baseline") for c in self.baselines]
        for steps in self.ladder.steps:
            self._measure([Request(candidate, steps) for candidate in candidates[: self._room(steps)]])

    def _measure(self, requests: Sequence[Request]) -> list[Evaluation]:
        """Evaluation of each request, in order; only what neither history nor journal knows is evaluated."""
        measuring = self._evaluate([r for r in requests if self.journal.evaluation(r.configuration, r.steps) is None])
        measured = []
        for request in requests:
            known = self.history.get(request.configuration, request.steps)
            if known is None:
                record = self._recorded(request, measuring)
                known = record.evaluation
                self.history.append(known)
                self.records.append(record)
                self.reporter.evaluated(record, self._progress(request.steps))
            measured.append(known)
        return measured

    def _recorded(self, request: Request, measuring: Iterator[None]) -> Record:
        """What the journal holds of a request, after as many groups were measured as that takes."""
        while (record := self.journal.evaluation(request.configuration, request.steps)) is None:
            next(measuring)
        return record

    def _evaluate(self, requests: Sequence[Request]) -> Iterator[None]:
        """Measures and records the requests group by group, one at each `next`."""
        if not requests:
            return
        self.reporter.progress(self._progress(requests[0].steps))
        evaluator = self.settings.evaluator
        for group in evaluator.groups(requests):
            evaluations = evaluator.evaluate(group)
            self.journal.extend([(r.candidate, e) for r, e in zip(group, evaluations, strict=True)])
            yield
            self.reporter.progress(self._progress(requests[0].steps))

    # Phase I

    def _explore(self) -> None:
        settings, searcher = self.settings, self.settings.searcher
        rng = np.random.default_rng([settings.seed, 1])
        searcher.attach(self.context)
        searcher.begin(self.proposer, self.ladder)
        self.phase = "global"
        for number in range(1, settings.generations + 1):
            began = time.monotonic()
            self.generation = number
            candidates = self._asked(f"generation/{number}", searcher, rng, self._ask_searcher)
            if not candidates:
                self.stop_reasons["global"] = "nothing new could be proposed"
                return
            searcher.tell(self._race(candidates))
            self._summarise(number, time.monotonic() - began)
            if settings.promotion == "each":  # else any of them may still go on
                self._prune()
            if reason := self._enough():
                self.stop_reasons["global"] = reason
                return
            self.stop_reasons["global"] = f"the cap of {settings.generations} generations"

    def _enough(self) -> str:
        """Why phase I ends now; empty when it goes on."""
        settings = self.settings
        if settings.searcher.finished:
            return "the searcher finished"
        if self._room(self.ladder.highest) == 0:
            return f"the cap of {settings.max_evaluations} evaluations"
        if self._stalled():
            return (
                f"the hypervolume grew by less than {settings.hypervolume_tolerance:g} relatively "
                f"in {settings.hypervolume_patience} generations"
            )
        return ""

    def _room(self, steps: int) -> int | None:
        """How many more evaluations there may be at a rung; None when it has no cap."""
        cap = self.settings.max_evaluations
        if cap is None or steps != self.ladder.highest:
            return None
        return max(0, cap - sum(e.steps == steps for e in self.history))

    def _ask_searcher(self, rng: np.random.Generator) -> tuple[Request, ...]:
        candidates = self.settings.searcher.ask(self.history, rng)
        if not candidates:
            return ()
        (first, _), *_ = self._schedule(len(candidates))
        return tuple(Request(replace(c, generation=self.generation, phase="global"), first) for c in candidates)

    def _schedule(self, candidates: int) -> Sequence[tuple[int, int]]:
        """Rungs of the generation, and how many candidates run at each."""
        if self.settings.promotion == "last":  # whatever the searcher would begin at: all are judged alike
            return ((self.ladder.lowest, candidates),)
        return self.settings.searcher.schedule(self.ladder, candidates, self.settings.high_fidelity_candidates)

    def _race(self, requests: Sequence[Request]) -> list[Evaluation]:
        """All that was measured of a generation: each rung continues the most promising of the rung below."""
        self.quality: SurrogateQuality | None = None
        self.trusted = False
        return self._raced([request.candidate for request in requests], self._schedule(len(requests)))

    def _raced(self, candidates: Sequence[Candidate], schedule: Sequence[tuple[int, int]]) -> list[Evaluation]:
        running, measured, below = list(candidates), list[Evaluation](), 0
        for steps, size in schedule:
            room = self._room(steps)
            size = size if room is None else min(size, room)
            running = self._promoted(running, below, size) if below else running[:room]
            measured += self._measure([Request(candidate, steps) for candidate in running])
            below = steps
        return measured

    def _promote_last(self) -> None:
        """The one race after phase I: the best of all generations go up the ladder."""
        lowest = self.ladder.lowest
        ran = [r.candidate for r in self.records if r.candidate.phase == "global" and r.evaluation.steps == lowest]
        (_, *higher), self.generation = self.settings._schedule_of_the_last(), 0
        self.quality = None
        self._raced(ran, [(lowest, len(ran)), *higher])

    def _promoted(self, candidates: Sequence[Candidate], low: int, size: int) -> list[Candidate]:
        """The candidates that go on, best first: by the surrogate while it is trusted, else by the measured score."""

        def promote() -> dict[str, Any]:
            surrogate = self.settings.surrogate
            with self._timed("strategy"):
                surrogate.fit(self.problem, self.history, low=low, high=self.ladder.highest)
                ran = [e for e in (self.history.get(c.configuration, low) for c in candidates) if e and e.ok]
                merit = [e.score for e in ran]
                if surrogate.trusted:
                    merit = [guess.mean for guess in surrogate.predict(self.problem, ran)]
            return {
                "configurations": [str(c) for c in self._ordered(ran, merit)[:size]],
                "trusted": surrogate.trusted,
                "quality": None if surrogate.quality is None else asdict(surrogate.quality),
            }

        decision = self.journal.decided(f"promotion/{self.generation}/{low}", promote)
        if self.quality is None and decision["quality"] is not None:  # of the first promotion in a generation
            self.quality = SurrogateQuality(**decision["quality"])
            self.trusted = decision["trusted"]
        chosen = {text: position for position, text in enumerate(decision["configurations"])}
        going = [c for c in candidates if str(c.configuration) in chosen]
        return sorted(going, key=lambda c: chosen[str(c.configuration)])

    def _ordered(self, ran: Sequence[Evaluation], merit: Sequence[float]) -> list[Configuration]:
        """Configurations by what promotion goes by, merit in place of the score; ties go to fewer bytes."""
        if self.settings.promote_by == "front":
            guesses = [replace(e, score=m) for e, m in zip(ran, merit, strict=True)]
            return [e.configuration for front in fronts(guesses, self.settings.scope) for e in front]
        order = sorted(range(len(ran)), key=lambda i: (-merit[i], self.problem.bytes(ran[i].configuration), i))
        return [ran[i].configuration for i in order]

    def _summarise(self, number: int, seconds: float) -> None:
        front = self._front(self._judged_at())
        volume = front.hypervolume(self._reference(), self.problem.budget.limit_bytes)
        before = self.generations[-1].hypervolume if self.generations else 0.0
        growth = (volume - before) / (before + 1e-12) if self.generations else math.inf
        summary = GenerationSummary(number, front, volume, growth, self._best(), self.quality, self.trusted, seconds)
        self.generations.append(summary)
        self.reporter.generation(summary)

    def _reference(self) -> tuple[float, float]:
        """Corner of the hypervolume, fixed after generation 1: a tenth beyond the worst score and the budget."""

        def fix() -> list[float]:
            scores = [e.score for e in self._feasible(self._judged_at())]
            if not scores:
                return [math.inf, 1.1]
            return [-(min(scores) - 0.1 * ((max(scores) - min(scores)) or 1.0)), 1.1]

        corner = self.journal.decided("hypervolume reference", fix)
        return corner[0], corner[1]

    def _stalled(self) -> bool:
        patience = self.settings.hypervolume_patience
        recent = self.generations[-patience:]
        return len(recent) == patience and all(
            summary.relative_progress < self.settings.hypervolume_tolerance for summary in recent
        )

    # Phase II

    def _refine(self) -> None:
        settings, refiner = self.settings, self.settings.refiner
        measured = self._feasible()
        if not measured:
            raise SearchError(self._nothing_measured())
        rng = np.random.default_rng([settings.seed, 2])
        self.utility = Utility.over(measured, alpha=settings.alpha, scope=settings.scope)
        refiner.begin(self.proposer, self.ladder, self.utility, self.history)
        self.phase, number = "local", 0
        while not refiner.finished:
            if self._room(self.ladder.highest) == 0:
                self.stop_reasons["local"] = f"the cap of {settings.max_evaluations} evaluations"
                break
            began, before = time.monotonic(), self._best()
            number += 1
            self.generation = number
            requests = self._asked(f"refinement/{number}", refiner, rng, self._ask_refiner)
            if not requests:
                self.stop_reasons["local"] = refiner.stop_reason or "nothing new could be proposed"
                break
            refiner.tell(self._measure(requests))
            best = self._best()
            improved = best is not before
            summary = RefinementSummary(number, best, improved, refiner.diagnostics, time.monotonic() - began)
            self.refinements.append(summary)
            self.reporter.refinement(summary)
        else:
            self.stop_reasons["local"] = refiner.stop_reason
        self._prune()

    def _ask_refiner(self, rng: np.random.Generator) -> tuple[Request, ...]:
        requests = self.settings.refiner.ask(self.history, rng)
        return tuple(
            replace(r, candidate=replace(r.candidate, generation=self.generation, phase="local")) for r in requests
        )

    # The answer

    def _feasible(self, steps: int | None = None) -> list[Evaluation]:
        """What was measured at a rung, by default the highest, and fits."""
        return answer.fitting(self.problem, self.history, steps or self.ladder.highest)

    def _front(self, steps: int | None = None) -> ParetoFront:
        return answer.front(self.problem, self.history, steps or self.ladder.highest)

    def _judged_at(self) -> int:
        """The rung that phase I is judged by."""
        return self.ladder.lowest if self.settings.promotion == "last" else self.ladder.highest

    def _best(self) -> Evaluation | None:
        """Largest utility among what scores no worse than the best uniform baseline; ties go to fewer bytes."""
        utility = getattr(self, "utility", None)
        if self._known_best is None or self._known_best[0] != (len(self.history), utility):
            self._known_best = (len(self.history), utility), self._find_best(utility)
        return self._known_best[1]

    def _find_best(self, utility: Utility | None) -> Evaluation | None:
        return answer.best(
            self.problem,
            self.history,
            self.ladder.highest,
            baselines=self.baselines,
            utility=self.settings.alpha if utility is None else utility,
        )

    def _conclude(self) -> SearchResult:
        best = self._best()
        assert best is not None  # _refine raises when nothing was measured
        references = self._measure_references()
        highest = self.ladder.highest
        baselines = [e for e in (self.history.get(c, highest) for c in self.baselines) if e is not None]
        weights = self.settings.evaluator.item_weights
        result = SearchResult(
            plan=self.plan,
            best=best,
            item_weights=None if weights is None else tuple(weights),
            front=self._front(),
            baselines=tuple(baselines),
            references=tuple(references),
            comparisons=tuple(paired_comparison(best, e, weights=weights) for e in (*baselines, *references)),
            history=self.history,
            records=tuple(self.records),
            generations=tuple(self.generations),
            refinements=tuple(self.refinements),
            stop_reasons=self.stop_reasons,
            utility=self.utility,
            test_scores=self._tested([best, *baselines, *references]),
            proposals=asdict(self.proposer.counts),
            top3_hit_rates=self._hit_rates(),
            seconds=self._spent(),
        )
        self.reporter.finished(result)
        return result

    def _measure_references(self) -> list[Evaluation]:
        """Uniform configurations outside the search, measured after it; they are in no history."""
        self.phase = "reference"
        found = []
        for choice in self.settings.references:
            configuration = Configuration((choice,) * self.problem.num_layers)
            known = self.history.get(configuration, self.ladder.highest)
            if known is None:
                request = Request(Candidate(configuration, "reference", phase="reference"), self.ladder.highest)
                record = self._recorded(request, self._evaluate([request]))
                self.reporter.evaluated(record, self._progress(request.steps))
                self.records.append(record)
                known = record.evaluation
            found.append(known)
        return found

    def _tested(self, evaluations: Sequence[Evaluation]) -> dict[str, dict[str, float]]:
        """Scores on test data by the configuration's text, of what succeeded; after all decisions were taken."""
        if not self.settings.test:
            return {}
        scores: dict[str, dict[str, float]] = {}
        for evaluation in evaluations:
            text = str(evaluation.configuration)
            if evaluation.ok and text not in scores:
                with self._timed("test"):
                    scores[text] = self.journal.decided(
                        f"test/{text}", partial(self.settings.evaluator.test, evaluation)
                    )
        return scores

    def _spent(self) -> dict[str, float]:
        """Seconds by stage and in all. Evaluations count those of interrupted runs too, the other stages do not."""
        stages = {"evaluation": sum(record.evaluation.seconds for record in self.records), **self.seconds}
        return {**stages, "total": sum(stages.values())}

    def _hit_rates(self) -> dict[str, float]:
        low, high = self.ladder.lowest, self.ladder.highest
        if low == high:
            return {}
        with self._timed("strategy"):
            return top3_hit_rates(self.settings.surrogate, self.problem, self.history, low=low, high=high)

    def _nothing_measured(self) -> str:
        reasons = Counter(e.reason for e in self.history if not e.ok).most_common(1)
        why = f"; most often: {reasons[0][0]}" if reasons else ""
        return (
            f"no configuration could be measured at {self.ladder.highest} steps{why}. "
            "See evaluations.csv for every reason; a smaller learning rate or batch size is the usual cure."
        )

    # Book-keeping

    def _asked(
        self,
        key: str,
        strategy: GlobalSearcher | LocalRefiner,
        rng: np.random.Generator,
        ask: Callable[[np.random.Generator], Sequence[Request]],
    ) -> tuple[Request, ...]:
        """What the strategy asks for; taken from the journal, with strategy and generator set to go on from there."""
        saved = self.journal.decision(key)
        if saved is None:
            with self._timed("strategy"):
                requests = tuple(ask(rng))
            state = {
                "strategy": strategy.state(),
                "rng": rng.bit_generator.state,
                "proposals": self.proposer.counts.state(),
            }
            self.journal.decide(key, {"requests": [request_data(r) for r in requests], **state})
            return requests
        strategy.restore(saved["strategy"])
        rng.bit_generator.state = saved["rng"]
        self.proposer.counts.restore(saved["proposals"])
        return tuple(request_of(data) for data in saved["requests"])

    def _prune(self) -> None:
        """Delete checkpoints that nothing will continue or report."""
        kept = {e.configuration for e in self._front().evaluations} | set(self.baselines)
        best = self._best()
        kept |= {best.configuration} if best else set()
        for evaluation in self.history:
            key = (evaluation.configuration, evaluation.steps)
            needed = evaluation.steps == self.ladder.highest and evaluation.configuration in kept
            if evaluation.checkpoint and not needed and key not in self.discarded:
                self.settings.evaluator.discard(evaluation)
                self.discarded.add(key)

    def _progress(self, rung: int) -> Progress:
        planned = self.plan.evaluations
        done = Counter(record.evaluation.steps for record in self.records)
        left = sum(steps * max(0, count - done[steps]) for steps, count in planned.items())
        spent = [(r.evaluation.seconds, r.evaluation.steps) for r in self.records if r.evaluation.ok]
        rate = sum(s for s, _ in spent) / sum(n for _, n in spent) if spent else None
        return Progress(
            phase=self.phase,
            generation=self.generation,
            rung=rung,
            done=len(self.records),
            planned=sum(planned.values()),
            best=self._best(),
            seconds=time.monotonic() - self.started,
            seconds_left=None if rate is None else rate * left,
        )

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[stage] += time.monotonic() - began  # type: ignore[assignment]
