"""Where the search starts: importance-shaped prototypes, uniform configurations, perturbed variants (Eq. 6)."""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Sequence
from contextlib import suppress

import numpy as np

from qratk.core.configuration import KNOBS, Configuration, Knob, unique
from qratk.core.edits import Ledger, weights_of_layers
from qratk.core.errors import InfeasibleBudgetError
from qratk.core.evaluation import Candidate, History
from qratk.core.problem import Problem
from qratk.core.shared import Shared
from qratk.mutations.proposer import Proposer
from qratk.programs.integer import bits_then_ranks
from qratk.searchers.sampling import sample_feasible


def greedy_fill(
    problem: Problem, start: Configuration, *, epsilon: float, knobs: Sequence[Knob] = KNOBS
) -> Configuration:
    """Start raised by the affordable single steps with the largest (importance + epsilon) / bytes, until none is left.

    Follows Eq. 6, whose monotone maps the paper leaves open: of two layers of equal size the more important never ends
    lower on a ladder. Ties go to the fewer bytes, then the lower layer, then bits before rank.
    """
    ledger = Ledger(problem, start)
    weights = weights_of_layers(problem, epsilon)
    columns = [KNOBS.index(knob) for knob in knobs]
    heap = [
        _priced(ledger, weights, layer, column)
        for column in columns
        if ledger.rungs(column) > 1
        for layer in np.flatnonzero(ledger.possible(1)[:, column]).tolist()
    ]
    heapq.heapify(heap)
    parked: list[tuple[float, int, int, int]] = []
    while heap:
        entry = heapq.heappop(heap)
        _, added, layer, column = entry
        ledger.step(layer, column, 1)
        if not ledger.fits:
            # Room only ever shrinks, so that this knob is done, save where a higher rung frees bytes (see below).
            ledger.step(layer, column, -1)
            parked.append(entry)
            continue
        if ledger.indices[layer, column] + 1 < ledger.rungs(column):
            heapq.heappush(heap, _priced(ledger, weights, layer, column))
        if added < 0 and parked:
            heap += parked
            parked = []
            heapq.heapify(heap)
    return ledger.configuration()


def _priced(ledger: Ledger, weights: np.ndarray, layer: int, column: int) -> tuple[float, int, int, int]:
    added = ledger.step_bytes(layer, column, 1)
    worth = float(weights[layer, column]) / added if added > 0 else math.inf
    return -worth, added, layer, column


def leading_shared(problem: Problem, history: History) -> Shared | None:
    """Settings of the best score at the highest rung that anything in the space was measured at; None before that.

    The uniform baselines have raced by then: prototypes begin with settings that were tuned on them.
    """
    if not problem.space.shared:
        return ()
    able = [e for e in history if e.ok and e.configuration in problem.space and problem.feasible(e.configuration)]
    best = max(able, key=lambda e: (e.steps, e.score), default=None)
    return None if best is None else best.configuration.shared


def prototypes(problem: Problem, *, epsilon: float) -> tuple[Configuration, ...]:
    """Prototypes filled from every uniform floor that fits, without repeats; the paper's joint fill is the first.

    All have the middle settings.

    A bit step takes some 40 times the bytes of a rank step, so that the joint fill raises all ranks before any bits.
    The others raise bits first over a fixed floor of both knobs, and spend on ranks what is left.
    """
    space = problem.space
    found = [greedy_fill(problem, space.smallest, epsilon=epsilon)]
    for floor in uniforms_that_fit(problem):
        bits_first = greedy_fill(problem, floor, epsilon=epsilon, knobs=("bits",))
        found.append(greedy_fill(problem, bits_first, epsilon=epsilon, knobs=("rank",)))
    return unique(found)


def solved_prototypes(problem: Problem) -> tuple[Configuration, ...]:
    """Prototypes by integer programs, bits first and then ranks, for every rank floor that fits, without repeats.

    For an error of rounding that falls as it does before fine-tuning, and for one that falls half as fast.
    """
    found = []
    for decay in (1.0, 0.5):
        for floor in reversed(problem.space.ranks):
            with suppress(InfeasibleBudgetError):
                found.append(bits_then_ranks(problem, floor, decay=decay))
    return unique(found)


def uniforms_that_fit(problem: Problem) -> tuple[Configuration, ...]:
    """Uniform configurations within the budget, the largest first, at the middle settings."""
    fitting = [uniform for uniform in problem.space.uniforms() if problem.feasible(uniform)]
    return tuple(sorted(fitting, key=lambda uniform: (-problem.bytes(uniform), uniform)))


def initial_candidates(
    proposer: Proposer,
    rng: np.random.Generator,
    *,
    size: int,
    epsilon: float,
    known: Collection[Configuration] = (),
    uniforms: bool = True,
    solved: bool = False,
    shared: Shared | None = None,
) -> tuple[Candidate, ...]:
    """At most `size` feasible candidates, none known: prototypes, uniforms, then perturbed variants of prototypes.

    Prototypes take at most half of the places and uniforms a quarter, the largest first, so that perturbed variants
    are never crowded out by long ladders. With `solved`, prototypes by integer programs come right after the first.
    All begin with the settings `shared`, each with a draw of its own where that is None; seeds go round.
    """
    problem = proposer.problem
    first, *others = prototypes(problem, epsilon=epsilon)
    seeds = (first, *(solved_prototypes(problem) if solved else ()), *others)
    seeds = unique(proposer.filled(seed) for seed in seeds)
    seeds = tuple(_with_shared(problem, seed, shared, rng, place=n) for n, seed in enumerate(seeds))
    fitting = uniforms_that_fit(problem) if uniforms else ()
    fitting = tuple(_with_shared(problem, uniform, shared, rng, place=n) for n, uniform in enumerate(fitting))
    chosen: dict[Configuration, Candidate] = {}
    for origin, configurations, places in (
        ("prototype", seeds, math.ceil(size / 2)),
        ("uniform", fitting, math.ceil(size / 4)),
    ):
        fresh = [c for c in configurations if c not in known and c not in chosen][:places]
        chosen |= {c: Candidate(c, origin) for c in fresh}
    tries = 0
    while len(chosen) < size and tries < 20 * size:
        variant = _perturbed(proposer, seeds[tries % len(seeds)], rng)
        tries += 1
        if variant is not None and variant.configuration not in known and variant.configuration not in chosen:
            chosen[variant.configuration] = variant
    return tuple(chosen.values())[:size]


def _with_shared(
    problem: Problem, configuration: Configuration, shared: Shared | None, rng: np.random.Generator, *, place: int
) -> Configuration:
    space = problem.space
    return configuration.with_shared(space.random_shared(rng) if shared is None else space.reseeded(shared, place))


def random_candidates(
    problem: Problem, rng: np.random.Generator, *, size: int, generation: int, known: Collection[Configuration]
) -> tuple[Candidate, ...]:
    """At most `size` random feasible candidates, none known."""
    chosen: dict[Configuration, Candidate] = {}
    for _ in range(size):
        found = sample_feasible(problem, rng, known={*known, *chosen})
        if found is None:
            break
        chosen[found] = Candidate(found, "random", generation=generation)
    return tuple(chosen.values())


def _perturbed(proposer: Proposer, prototype: Configuration, rng: np.random.Generator) -> Candidate | None:
    """Variant of a prototype after one to about L / 4 edits."""
    most = max(2, min(8, proposer.problem.num_layers // 4))
    varied = proposer.vary(prototype, rng, edits=int(rng.integers(1, most + 1)))
    if varied is None:
        return None
    return Candidate(varied[0], f"perturbed:{varied[1]}", (prototype.digest,))
