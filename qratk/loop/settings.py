"""What a search is asked for: its strategies, ladders, budget, rungs and stopping rules."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from qratk.core.checks import Checks
from qratk.core.configuration import Configuration, LayerChoice
from qratk.core.errors import ConfigurationError
from qratk.core.evaluation import MOST_SEEDS, FidelityLadder
from qratk.core.memory import Budget, MemoryModel, Scope, parse_bytes, resolve_budget
from qratk.core.result import SearchResult
from qratk.core.shared import REPLICATE, SharedLadder, shared_ladders, spread_size
from qratk.core.space import SearchSpace
from qratk.estimators.base import ImportanceEstimator
from qratk.evaluators.base import Evaluator
from qratk.executors.base import Blueprint, Executor, executors
from qratk.loop.serving import require_client, require_served
from qratk.mutations.base import MutationOperator, mutations
from qratk.refiners.base import LocalRefiner
from qratk.repairs.base import RepairPolicy
from qratk.reporters.base import Reporter
from qratk.run.journal import Comparable
from qratk.searchers.base import GlobalSearcher
from qratk.surrogates.base import PromotionSurrogate

if TYPE_CHECKING:
    from lightning import Trainer

    from qratk.data.base import TaskData
    from qratk.training.module import FineTuneModule

SETTINGS_AT_THE_TOP: Final = 2
"""How many combinations of settings of one uniform choice run to T_S, where the others take the best of them."""

LAYOUTS: Final = 3
"""Of how many of the best layers further settings are tried with what a budget of full runs leaves."""

Schedule = tuple[tuple[int, int], ...]
"""Rungs of a race, ascending, and how many candidates run at each."""


@dataclass(frozen=True, kw_only=True)
class Confirmation:
    """How the answer of a search is confirmed.

    Args:
        candidates: how many of the best are run again; the best uniform baseline is, beside or among them.
        seeds: how often each of them, with fresh seeds of the order of the training data and of the adapters.
    """

    candidates: int = 3
    seeds: int = 3

    def __post_init__(self) -> None:
        checks = Checks()
        for option, given in (("candidates", self.candidates), ("seeds", self.seeds)):
            whole = isinstance(given, int) and not isinstance(given, bool)
            checks.require(whole and given >= 1, option, given, "must be a whole number of at least 1")
        checks.finish()

    @classmethod
    def of(cls, given: Confirmation | Mapping[str, Any] | None) -> Confirmation | None:
        """From itself, or from a mapping of its options; raises `ConfigurationError`."""
        if given is None or isinstance(given, Confirmation):
            return given
        known = [own.name for own in fields(cls)]
        if not isinstance(given, Mapping) or not given.keys() <= set(known):
            raise ConfigurationError(
                f"is a mapping of {' and '.join(known)}, as in {{candidates: 3, seeds: 3}}; got {given!r}"
            )
        return cls(**given)


@dataclass(frozen=True, kw_only=True)
class SearchSettings(ABC):
    """Settings of a search, checked; `SearchLoop` runs them.

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
        shared: ladders of options of the model that a configuration has one value of, by name, as in {learning_rate:
            [1e-3, 3e-3, 1e-2], rslora: [false, true]}: ascending numbers, or names. The largest uniform baseline is
            measured with every value of each at the lowest rung, and its best two go up; of the others those that none
            exceeds in bits and rank have the better of these, and their best go up too, one fewer than
            `high_fidelity_candidates`. Where nothing is searched, every uniform configuration is measured with all
            combinations there, and the best of each goes up.
        seeds: how many seeds configurations may be trained with: of the order of the training rows, of adapters and of
            dropout. Which, is a setting like those that are `shared`, named replicate, that the search picks: trainings
            of one configuration differ by as much as configurations do, and what is found is a training.
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
        max_evaluations: cap on the evaluations at T_S in both phases, baselines included; confirmation is besides.
        confirm: whether the best few, and the best uniform baseline, are run again at T_S with fresh seeds after both
            phases, as {candidates: 3, seeds: 3}: the answer is then chosen, and reported, by the mean over these.
        full_runs: how many full runs of training (to T_S) the search spends in all, on short runs, tuning and fresh
            seeds too; references and scoring are apart. Phases I and II end where the next step would exceed it. What
            they leave goes to further settings of the best layers, and to fresh seeds of the best few, by whose mean
            the answer is then chosen.
        client: what is to serve the answer, `for` in files and on the command line: "vllm", "vllm-cpu", "llama.cpp" or
            another that an exporter has. What it cannot serve (granularity, bits, groups, quantisers, adapters) is
            refused before anything is loaded.
        merge: how many of the best trainings may be averaged into the answer's adapter, which takes no training: from
            the best on, each is kept in where the validation score rises (0: none).
        generations: cap on the generations of phase I.
        hypervolume_tolerance: epsilon_hv; phase I stops when the hypervolume grows by less, relatively,
        hypervolume_patience: for this many generations in a row (Eq. 28).
        alpha: weight of the score against bytes in the utility of phase II and of the answer (Eq. 4). The budget is
            a hard limit already, so by default (1) the answer is what scores best within it.
        references: uniform [bits, rank] pairs measured for comparison only, on or off the ladders, as in [[16, 16]].
        test: whether the best, the baselines and the references are scored on test data after the search; `answer` is
            the best alone.
        seed: seed of every random choice of the search.
        name: name of the run.
        executor: where evaluations happen; it decides nothing of what they come to.
        reporters: who shows and writes what happens, when the command line runs the search; without `files` a run has
            no result for other commands to read.
    """

    evaluator: Evaluator
    searcher: GlobalSearcher
    refiner: LocalRefiner
    surrogate: PromotionSurrogate
    mutations: list[MutationOperator]
    repair: RepairPolicy
    bits_importance: ImportanceEstimator
    rank_importance: ImportanceEstimator
    bits: Sequence[int] = (2, 4, 8)
    ranks: Sequence[int] = (4, 8, 16)
    shared: dict[str, list[bool | int | float | str]] = field(default_factory=dict)
    seeds: int = 1
    limit: str | None = None
    like: Sequence[int] | None = None
    scope: Scope = "storage"
    max_average_bits: float | None = None
    steps: Sequence[int] = (100, 300, 900)
    multi_fidelity: bool = True
    reduction_factor: float = 3.0
    high_fidelity_candidates: int = 3
    promotion: Literal["each", "last"] = "each"
    promote_by: Literal["score", "front"] = "score"
    uniform_baselines: bool = True
    max_evaluations: int | None = None
    confirm: Confirmation | None = None
    full_runs: float | None = None
    client: str | None = None
    merge: int = 0
    generations: int = 12
    hypervolume_tolerance: float = 1e-3
    hypervolume_patience: int = 3
    alpha: float = 1.0
    references: Sequence[Sequence[int]] = ()
    test: bool | Literal["answer"] = True
    seed: int = 0
    name: str = "search"
    executor: Executor = field(default_factory=lambda: executors.create("serial"))
    reporters: list[Reporter] = field(default_factory=list)

    def __post_init__(self) -> None:
        checks = Checks()
        checks.at_least(0, generations=self.generations, seed=self.seed, merge=self.merge)
        checks.at_least(1, high_fidelity_candidates=self.high_fidelity_candidates, max_evaluations=self.max_evaluations)
        checks.at_least(1, hypervolume_patience=self.hypervolume_patience, full_runs=self.full_runs, seeds=self.seeds)
        checks.require(self.seeds < MOST_SEEDS, "seeds", self.seeds, f"must be under {MOST_SEEDS}")
        for option, known in (("promotion", ("each", "last")), ("promote_by", ("score", "front"))):
            given = getattr(self, option)
            checks.require(given in known, option, given, f"must be one of {', '.join(map(repr, known))}")
        checks.require(self.test in (True, False, "answer"), "test", self.test, "must be true, false or 'answer'")
        checks.require(0.0 <= self.alpha <= 1.0, "alpha", self.alpha, "must lie in [0, 1]")
        mean = self.max_average_bits
        checks.require(mean is None or 0 < mean < math.inf, "max_average_bits", mean, "must be positive")
        for pair in self.references:
            checks.require(len(pair) == 2, "references", list(pair), "must be pairs [bits, rank], as in [[16, 16]]")
        if self.limit is not None:
            try:
                parse_bytes(self.limit)
            except ConfigurationError as error:
                checks.note("limit", str(error))
        for option, values in (self.shared or {}).items():
            try:
                self.evaluator.check_shared(SharedLadder(option, tuple(values)))
            except ConfigurationError as error:
                checks.note(f"shared.{option}", _without(option, error))
        try:
            object.__setattr__(self, "confirm", Confirmation.of(self.confirm))
        except ConfigurationError as error:
            checks.note("confirm", str(error))
        if self.full_runs is not None and self.planned_replicates >= self.full_runs:
            checks.note(
                "full_runs", f"must be over {self.planned_replicates}, which confirm takes; got {self.full_runs:g}"
            )
        for option, wanted in (("confirm", bool(self.confirm)), ("seeds", self.seeds > 1)):
            if wanted and not self.evaluator.replicates:
                name = getattr(self.evaluator, "component_name", None) or type(self.evaluator).__name__
                checks.note(
                    option,
                    f"needs an evaluator that runs a configuration again with fresh seeds, and {name!r} does not; "
                    "leave it out, or use the evaluator 'finetune'",
                )
        if REPLICATE in (self.shared or {}):
            checks.note(f"shared.{REPLICATE}", "is what search.seeds makes a ladder of: give seeds, as in seeds: 8")
        if self.client is not None:
            try:
                require_client(self.client)
            except ConfigurationError as error:
                checks.note("for", str(error))
        named = bool(self.name) and self.name not in (".", "..") and not set("/\\\0") & set(self.name)
        checks.require(named, "name", self.name, "must be the name of a folder, without a path")
        checks.finish()
        _ = self.ladder  # raises where there is none

    @abstractmethod
    def run(
        self,
        *,
        run_dir: Path,
        reporter: Reporter,
        config: Mapping[str, Any],
        comparable: Comparable = dict,
        module: FineTuneModule | None = None,
        datamodule: TaskData | None = None,
        trainer: Callable[..., Trainer] | None = None,
        blueprint: Blueprint | None = None,
    ) -> SearchResult:
        """What the search found."""

    def require_served(self, module: FineTuneModule | None) -> tuple[str, ...]:
        """What a person should know of the answer in the hands of `client`; nothing without one.

        Loads no weights. Raises `ConfigurationError` for what could be found and not be served.
        """
        if self.client is None or module is None:
            return ()
        return require_served(self.client, module, self.bits)

    @cached_property
    def shared_ladders(self) -> tuple[SharedLadder, ...]:
        """Ladders of the settings that configurations share, the seed among them."""
        return shared_ladders({**self.shared, **({REPLICATE: list(range(self.seeds))} if self.seeds > 1 else {})})

    @cached_property
    def operators(self) -> tuple[MutationOperator, ...]:
        """The mutations; where settings are shared one that steps these is among them."""
        given = tuple(self.mutations)
        if not self.shared_ladders or any(getattr(operator, "component_name", "") == "shared" for operator in given):
            return given
        return (*given, mutations.create("shared"))

    @cached_property
    def ladder(self) -> FidelityLadder:
        """The rungs that are used: T_S alone without multi-fidelity."""
        ladder = FidelityLadder(tuple(self.steps), self.reduction_factor)
        return ladder if self.multi_fidelity else FidelityLadder(ladder.steps[-1:], self.reduction_factor)

    @property
    def judged_at(self) -> int:
        """The rung that phase I is judged by."""
        return self.ladder.lowest if self.promotion == "last" else self.ladder.highest

    @property
    def reference_choices(self) -> tuple[LayerChoice, ...]:
        """Bits and rank of each reference, each once."""
        pairs = dict.fromkeys((int(bits), int(rank)) for bits, rank in self.references)
        return tuple(LayerChoice(bits, rank) for bits, rank in pairs)

    @property
    def last_race(self) -> Schedule:
        """Rungs and sizes of the one race after phase I: that of a single generation."""
        sizes = self.ladder.sizes(self.searcher.generation_size, self.high_fidelity_candidates)
        return tuple(zip(self.ladder.steps, sizes, strict=True))

    @property
    def combinations(self) -> int:
        """How many combinations of shared settings there are; one without any."""
        return math.prod(len(ladder.values) for ladder in self.shared_ladders)

    @property
    def untrained(self) -> int | None:
        """Rung that trains nothing; None where each does."""
        bare = self.evaluator.proxy and len(self.ladder.steps) > 1
        return self.ladder.lowest if bare else None

    @property
    def tuned_above(self) -> bool:
        """Whether the lowest rung is without shared settings: it trains nothing, and there are some."""
        return bool(self.shared_ladders) and self.untrained is not None

    @property
    def settings_race(self) -> Schedule:
        """Rungs, and how many combinations of shared settings of one uniform choice run at each: one at the highest.

        A rung that trains nothing cannot tell settings apart, and is left out.
        """
        steps = self.ladder.steps[1:] if self.tuned_above else self.ladder.steps
        return tuple(zip(steps, FidelityLadder(steps, self.reduction_factor).sizes(self.combinations, 1), strict=True))

    @property
    def spreads_baselines(self) -> bool:
        """Whether uniform baselines race together, few settings each: the search itself goes on to tune settings."""
        return bool(self.shared_ladders) and self.searcher.settles and self.generations > 0 and not self.tuned_above

    def baselines(self, fitting: Sequence[Configuration]) -> Sequence[Configuration]:
        """Of the uniform configurations that fit those that are measured as baselines."""
        if not self.uniform_baselines:
            return ()
        return [c for c in fitting if not self.spreads_baselines or not any(_exceeds(other, c) for other in fitting)]

    def baseline_race(self, baselines: int) -> Schedule:
        """Rungs, and how many of so many uniform choices, at whatever settings, run at each."""
        if not baselines:
            return tuple((steps, 0) for steps, _ in self.settings_race)
        if not self.spreads_baselines:
            return tuple((steps, size * baselines) for steps, size in self.settings_race)
        own, rest = self.spread_races(baselines)
        return tuple((steps, size + further) for (steps, size), (_, further) in zip(own, rest, strict=True))

    def spread_races(self, baselines: int) -> tuple[Schedule, Schedule]:
        """Rungs and sizes of the race of the first uniform choice over the settings, and of that of the others."""
        own = self.ladder.sizes(self._longest, SETTINGS_AT_THE_TOP)
        rest = self.ladder.sizes(baselines - 1, max(1, self.high_fidelity_candidates - 1))
        steps = self.ladder.steps
        return tuple(zip(steps, own, strict=True)), tuple(zip(steps, rest, strict=True))

    @property
    def reference_race(self) -> Schedule:
        """The same of one reference, which runs to the highest rung at once where no settings are shared."""
        if not self.shared_ladders:
            return ((self.ladder.highest, 1),)
        if not self.spreads_baselines:
            return self.settings_race
        sizes = self.ladder.sizes(self._longest, 1)
        return tuple(zip(self.ladder.steps, sizes, strict=True))

    @property
    def _longest(self) -> int:
        """So many combinations of shared settings show every value of each."""
        return spread_size(self.shared_ladders)

    def race(self, candidates: int) -> Schedule:
        """Rungs of the generation that was just asked for, and how many of its candidates run at each."""
        if self.promotion == "last":  # whatever the searcher would begin at: all are judged alike
            return ((self.ladder.lowest, candidates),)
        return self.searcher.schedule(self.ladder, candidates, self.high_fidelity_candidates)

    def planned_evaluations(self, baselines: int) -> dict[int, int]:
        """Largest number of evaluations at each rung (steps), given how many uniform choices of bits and rank fit."""
        highest = self.ladder.highest
        counts = Counter(dict(self.baseline_race(baselines)))
        phases = [self.searcher.planned_evaluations(self.ladder, self.high_fidelity_candidates, self.generations)]
        phases += [self._planned_tuning()]
        if self.promotion == "last":
            (lowest, _), *higher = self.last_race
            phases = [{lowest: self.generations * self.searcher.generation_size}, dict(higher), self._planned_tuning()]
        if self.tuned_above:
            phases = self._planned_above(phases[0])
        for phase in (*phases, self.refiner.planned_evaluations(self.ladder)):
            counts.update(phase)
        if self.max_evaluations is not None:
            counts[highest] = min(counts[highest], self.max_evaluations)
        counts[highest] += self.planned_replicates
        if self.full_runs is not None:
            counts = self._within_budget(counts, self.full_runs)
        for steps, size in self.reference_race:
            counts[steps] += size * len(self.reference_choices)
        return dict(sorted(counts.items()))

    def _planned_above(self, searched: Mapping[int, int]) -> list[dict[int, int]]:
        """Phases where the lowest rung is without settings: of what would reach T_S all of them race above it."""
        highest, lowest = self.ladder.highest, self.ladder.lowest
        picked = self.last_race[-1][1] if self.promotion == "last" else searched[highest]
        return [{lowest: searched.get(lowest, 0)}, {steps: picked * size for steps, size in self.settings_race}]

    def _within_budget(self, counts: Mapping[int, int], full_runs: float) -> Counter[int]:
        """At most as many at each rung as a budget pays for, whatever of it the recipe leaves spent too."""
        found, highest = Counter(counts), self.ladder.highest
        for steps, _ in self.settings_race[:-1] if self.shared_ladders else ():
            found[steps] += LAYOUTS * self.combinations
        for steps in set(self.ladder.steps) - {self.untrained}:
            most = int(full_runs * highest / steps)
            found[steps] = most if steps == highest else min(most, found[steps])
        return found

    @property
    def planned_replicates(self) -> int:
        """Largest number of runs with fresh seeds, each from nothing to the highest rung."""
        if self.confirm is None:
            return 0
        return (self.confirm.candidates + bool(self.uniform_baselines)) * self.confirm.seeds

    @property
    def contenders(self) -> int:
        """How many of the best may be run again with fresh seeds: by the confirmation, or by what a budget leaves."""
        if self.confirm is not None:
            return self.confirm.candidates
        further = self.full_runs is not None and self.evaluator.replicates and self.seeds == 1
        return Confirmation().candidates if further else 0

    def _planned_tuning(self) -> dict[int, int]:
        """Evaluations that find the settings of candidates without any, besides those that the candidates race by."""
        if self.searcher.settles or not self.shared_ladders:
            return {}
        candidates = self.searcher.generation_size * min(self.generations, 1)
        (first, _), *_ = self.race(self.searcher.generation_size)
        return {s: candidates * (size - (s == first)) for s, size in self.settings_race if s <= first}

    def pose(
        self, names: Sequence[str], memory_model: Callable[[SearchSpace], MemoryModel]
    ) -> tuple[MemoryModel, Budget]:
        """Bytes and budget over the layers with these names. Raises `ConfigurationError` or `InfeasibleBudgetError`."""
        bits, ranks, limit, like = tuple(self.bits), tuple(self.ranks), self.limit, self.like
        if like is not None and len(like) == 2 and not (like[0] in bits and like[1] in ranks):
            if limit is not None:
                raise ConfigurationError(
                    "state the budget once: either a size ('limit') or a uniform configuration ('like')"
                )
            one = memory_model(SearchSpace((int(like[0]),), (int(like[1]),), tuple(names)))
            limit, like = str(one.bytes(one.space.smallest, self.scope)), None
        memory = memory_model(SearchSpace(bits, ranks, tuple(names), self.shared_ladders))
        return memory, resolve_budget(
            memory, limit=limit, like=like, scope=self.scope, max_average_bits=self.max_average_bits
        )


def _exceeds(a: Configuration, b: Configuration) -> bool:
    """Whether one uniform configuration has no fewer bits and no lower rank than another, and more of one."""
    return a.layers != b.layers and a.bits[0] >= b.bits[0] and a.ranks[0] >= b.ranks[0]


def _without(option: str, error: ConfigurationError) -> str:
    """What an error says of an option, without the name that it begins with."""
    text = error.problems[0].text if error.problems else str(error)
    return text.removeprefix(f"{option} ").removeprefix(f"{option}: ")
