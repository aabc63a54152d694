"""What strategies with several trust regions share (Eq. 11-20, App. C.3-C.4)."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qratk.core.configuration import Configuration
from qratk.core.errors import ConfigurationError
from qratk.core.evaluation import Candidate, Evaluation, FidelityLadder, History, Request
from qratk.core.utility import Utility
from qratk.mutations.proposer import Proposer
from qratk.refiners._model_guided import ModelGuided, Pool
from qratk.refiners._pool import embed, pool
from qratk.refiners._regions import RadiusRule, Region, spread

INFORMATIVE_PAIRS = 4
"""From so many measurements at both rungs on, the process is informed by short runs."""


class TrustRegions(ModelGuided):
    """One evaluation at a time at the highest rung: the pool member of largest expected improvement.

    A strategy names itself, and says which options it has and with what defaults.

    Args:
        regions: number of trust regions, J.
        diversity: least number of atomic edits between the first centres, Delta_div.
        radius, min_radius, max_radius: first, least and largest radius in atomic edits, delta.
        max_evaluations: cap on evaluations at the highest rung, N_max.
        max_region_evaluations: cap on those of one region, N_max^TR.
        kernel, mix: the process, and how it joins its two kernels; `TrustRegion` explains these and the others.
    """

    @abstractmethod
    def __init__(
        self,
        *,
        regions: int,
        diversity: int,
        radius: int,
        min_radius: int,
        max_radius: int,
        max_evaluations: int,
        max_region_evaluations: int,
        pool_size: int,
        min_expected_improvement: float,
        kernel: Literal["matern", "cocabo"],
        mix: float,
        expand: float = 2.0,
        shrink: float = 0.5,
        replace_exhausted: bool = False,
        ard: bool = False,
        low_fidelity: bool = False,
        probes: int = 8,
        probe_rounds: int = 2,
    ) -> None:
        counts = {
            "regions": regions, "diversity": diversity, "max_region_evaluations": max_region_evaluations,
            "pool_size": pool_size, "probes": probes, "probe_rounds": probe_rounds,
        }  # fmt: skip
        for name, value in counts.items():
            if value < 1:
                raise ConfigurationError(f"{self.origin}: {name} must be at least 1, got {value}")
        if min_expected_improvement < 0:
            raise ConfigurationError(
                f"{self.origin}: min_expected_improvement must not be negative, got {min_expected_improvement}"
            )
        if kernel not in ("matern", "cocabo") or not 0 <= mix <= 1:
            raise ConfigurationError(
                f"{self.origin}: kernel must be 'matern' or 'cocabo' and mix lie in [0, 1], got {kernel!r} and {mix}"
            )
        super().__init__(max_evaluations, ard=ard, mix=mix if kernel == "cocabo" else None)
        self.num_regions = regions
        self.diversity = diversity
        self.rule = RadiusRule(radius, min_radius, max_radius, expand, shrink)
        self.max_region_evaluations = max_region_evaluations
        self.replace_exhausted = replace_exhausted
        self.pool_size = pool_size
        self.log_threshold = math.log(min_expected_improvement) if min_expected_improvement > 0 else -math.inf
        self.low_fidelity = low_fidelity
        self.probes = probes
        self.probe_rounds = probe_rounds

    def begin(self, proposer: Proposer, ladder: FidelityLadder, utility: Utility, history: History) -> None:
        """Choose the centres: the best by utility, each `diversity` edits from the others."""
        super().begin(proposer, ladder, utility, history)
        self._informed = self.low_fidelity and len(ladder.steps) > 1
        self._asked: tuple[tuple[Request, int], ...] = ()  # requests not told yet, with their regions
        self._probed: Pool = {}  # pool members with a short run in this step
        self._round = 0
        self._promise: float | None = None  # largest log EI of the pool members without a short run
        ranked, space = self._ranked(history), proposer.problem.space
        centres = spread(ranked, space, count=self.num_regions, distance=self.diversity)
        self._regions = [Region(centre, self.rule.start) for centre in centres]

    def ask(self, history: History, rng: np.random.Generator) -> tuple[Request, ...]:
        """The next request at the highest rung, or probes at the lowest; empty when finished."""
        if self.finished:
            return ()
        self._best = self._utility_of(history, self._ranked(history)[0])
        self._replace_exhausted(history)
        return self._after_probes(history, rng) if self._probed else self._screen(history, rng)

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Update radius and centre of the region that generated the candidate (Eq. 18, 19)."""
        told = zip(self._asked, evaluations, strict=True)
        full = [(request, number, e) for (request, number), e in told if request.steps == self._ladder.highest]
        for request, number, evaluation in full:
            improved = self._utility.of(evaluation) > self._best
            self._regions[number] = self._regions[number].after(
                request.configuration, improved=improved, rule=self.rule
            )
        self._asked = ()
        self._count(len(full))
        if not self._stop and not self.replace_exhausted and not self._open():
            self._stop = f"every trust region used up its {self.max_region_evaluations} evaluations"

    @property
    def regions(self) -> tuple[Region, ...]:
        """The trust regions as they stand."""
        return tuple(self._regions)

    def planned_evaluations(self, ladder: FidelityLadder) -> dict[int, int]:
        """At most the caps at the highest rung; with `low_fidelity`, every round of probes before each of them."""
        regions = math.inf if self.replace_exhausted else self.num_regions * self.max_region_evaluations
        most = int(min(self.max_evaluations, regions))
        planned = {ladder.highest: most}
        if self.low_fidelity and len(ladder.steps) > 1 and most:
            planned[ladder.lowest] = self.probes * self.probe_rounds * most
        return planned

    def state(self) -> dict[str, Any]:
        """Regions, counters and requests that wait for their evaluation."""
        return {
            **super().state(),
            "regions": [[str(r.centre), r.radius, r.evaluations] for r in self._regions],
            "evaluations": self._evaluations,
            "asked": [_request_state(request, number) for request, number in self._asked],
            "probed": [[str(configuration), number] for configuration, number in self._probed.items()],
            "round": self._round,
            "promise": self._promise,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        super().restore(state)
        self._regions = [Region(Configuration.from_text(text), *counts) for text, *counts in state["regions"]]
        self._evaluations = state["evaluations"]
        self._asked = tuple(_restored_request(entry, self.origin) for entry in state["asked"])
        self._probed = {Configuration.from_text(text): number for text, number in state["probed"]}
        self._round = state["round"]
        self._promise = state["promise"]

    # -- the regions and their pool

    def _open(self) -> list[int]:
        return [n for n, region in enumerate(self._regions) if region.evaluations < self.max_region_evaluations]

    def _replace_exhausted(self, history: History) -> None:
        """Move each exhausted region to the best measured configuration away from all centres, if there is one."""
        if not self.replace_exhausted:
            return
        ranked, space = self._ranked(history), self._proposer.problem.space
        for number in set(range(len(self._regions))) - set(self._open()):
            centres = [region.centre for region in self._regions]
            for centre in spread(ranked, space, count=1, distance=self.diversity, taken=centres):
                self._regions[number] = Region(centre, self.rule.start)

    def _pool(self, history: History, rng: np.random.Generator) -> Pool:
        """Union of the open regions' pools (Eq. 15), without what ran at the highest rung or failed at any."""
        excluded = self._spent(history)
        while True:
            union: Pool = {}
            numbers = self._open()
            for number in numbers:
                region = self._regions[number]
                size = math.ceil(self.pool_size / len(numbers))
                found = pool(self._proposer, region.centre, region.radius, size=size, excluded=excluded, rng=rng)
                for configuration in found:
                    union.setdefault(configuration, number)
            if union or not self._grow(numbers):
                return union

    def _grow(self, numbers: Sequence[int]) -> bool:
        grown = {n: max(self.rule.grown(self._regions[n].radius), self._regions[n].radius + 1) for n in numbers}
        allowed = {n: radius for n, radius in grown.items() if radius <= self.rule.highest}
        for number, radius in allowed.items():
            region = self._regions[number]
            self._regions[number] = Region(region.centre, radius, region.evaluations)
        return bool(allowed)

    # -- the choice

    def _screen(self, history: History, rng: np.random.Generator) -> tuple[Request, ...]:
        """Request for the pool member of largest expected improvement (Eq. 17), or for probes of the best few."""
        candidates = self._pool(history, rng)
        if not candidates:
            return self._finish("nothing new is left in any trust region")
        order, scores = self._rank(history, candidates, rng)
        if scores is not None and scores[order[0]] < self.log_threshold:
            return self._finish("the expected improvement fell below the threshold")
        members = list(candidates.items())
        best = [members[n] for n in order]
        if not self._informed:
            return self._request(best[:1], self._ladder.highest)
        self._promise = _next_promise(scores, order, self.probes * (self._round + 1))
        return self._probe(history, rng, best)

    def _request(self, chosen: Sequence[tuple[Configuration, int]], steps: int) -> tuple[Request, ...]:
        requests = []
        for configuration, number in chosen:
            candidate = self._candidate(configuration, self._regions[number].centre)
            requests.append((Request(candidate, steps), number))
        if requests:
            number = requests[0][1]
            self._diagnostics |= {"region": float(number), "radius": float(self._regions[number].radius)}
        self._asked = tuple(requests)
        if requests and steps == self._ladder.highest:
            self._probed, self._round, self._promise = {}, 0, None
        return tuple(request for request, _ in requests)

    def _finish(self, reason: str) -> tuple[()]:
        self._asked = ()
        return super()._finish(reason)

    # -- short runs

    def _probe(
        self, history: History, rng: np.random.Generator, best: Sequence[tuple[Configuration, int]]
    ) -> tuple[Request, ...]:
        """Short runs of the best members; one that has its short run already joins the choice without another."""
        low = self._ladder.lowest
        top = dict(best[: self.probes * (self._round + 1)])
        self._round += 1
        self._probed |= top
        missing = [member for member in top.items() if history.get(member[0], low) is None][: self.probes]
        return self._request(missing, low) if missing else self._after_probes(history, rng)

    def _after_probes(self, history: History, rng: np.random.Generator) -> tuple[Request, ...]:
        """Request for the best probed member, for more probes, or none when neither promises anything."""
        alive = {c: number for c, number in self._probed.items() if self._low_utility(history, c) is not None}
        best, log_ei = self._best_probed(history, list(alive), rng)
        if best is not None and log_ei >= self.log_threshold:
            return self._request([(best, alive[best])], self._ladder.highest)
        if self._round < self.probe_rounds and self._promise is not None and self._promise >= self.log_threshold:
            return self._screen(history, rng)
        return self._finish(
            "no short run promised an improvement" if alive else "every short run of the local phase failed"
        )

    def _best_probed(
        self, history: History, alive: list[Configuration], rng: np.random.Generator
    ) -> tuple[Configuration | None, float]:
        """Probed member of largest informed expected improvement and its logarithm."""
        if not alive:
            return None, -math.inf
        seed = int(rng.integers(2**31))
        pairs = [(c, y, low) for c, y in self._measured(history) if (low := self._low_utility(history, c)) is not None]
        low_alive = np.array([self._low_utility(history, c) for c in alive])
        scores = None
        if len(pairs) >= INFORMATIVE_PAIRS:
            space, known = self._proposer.problem.space, np.array([low for *_, low in pairs])
            deviation = float(known.std()) or 1.0
            points = np.column_stack([embed(space, [c for c, *_ in pairs]), (known - known.mean()) / deviation])
            members = np.column_stack([embed(space, alive), (low_alive - known.mean()) / deviation])
            scores = self._scores(points, np.array([y for _, y, _ in pairs]), members, seed=seed, extra=1)
        if scores is None:  # too few pairs, or no fit: the short runs themselves decide
            return alive[self._ordered(alive, low_alive)[0]], math.inf
        best = self._ordered(alive, scores)[0]
        return alive[best], float(scores[best])

    def _low_utility(self, history: History, configuration: Configuration) -> float | None:
        evaluation = history.get(configuration, self._ladder.lowest)
        return self._utility.of(evaluation) if evaluation is not None and evaluation.ok else None


def _next_promise(scores: NDArray[np.float64] | None, order: Sequence[int], taken: int) -> float | None:
    """Log EI of the best member after the first `taken`; None when there is none."""
    if len(order) <= taken:
        return None
    return 0.0 if scores is None else _finite(scores[order[taken]])


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _request_state(request: Request, number: int) -> list[Any]:
    candidate = request.candidate
    return [str(candidate.configuration), list(candidate.parents), candidate.generation, request.steps, number]


def _restored_request(entry: list[Any], origin: str) -> tuple[Request, int]:
    text, parents, generation, steps, number = entry
    candidate = Candidate(Configuration.from_text(text), origin, tuple(parents), generation, "local")
    return Request(candidate, steps), number
