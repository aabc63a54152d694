"""Optuna's samplers as a global searcher."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from qratk import (
    Candidate,
    Configuration,
    ConfigurationError,
    FidelityLadder,
    GenerationSearcher,
    History,
    Problem,
    Proposer,
)

if TYPE_CHECKING:
    from qratk_optuna._study import Board

__all__ = ["OptunaSearch"]

TRIES = 4  # samples for one place of a generation, before a neighbour of the last one takes it


class OptunaSearch(GenerationSearcher):
    """Asks an Optuna sampler: one parameter for each knob of each layer, the index on its ladder, and for each setting.

    What a sampler suggests is repaired, and the sampler is told of the repaired configuration. It is told one figure a
    configuration, whatever rung that reached: its place in rung-major order, as a normal score (see `standings`).
    Uniform configurations that the loop measured count as trials too.

    The study is built anew from the history at each `ask`, with a sampler seeded from the loop's generator: nothing of
    Optuna's is ever saved, and a resumed search goes on identically.

    Args:
        sampler: tpe (Bergstra et al. 2011; Watanabe 2023), cmaes (Hansen and Ostermeier 2001), random, nsga2 (Deb et
            al. 2002) or gp (a Gaussian process).
        offspring: candidates a generation.
        encoding: ladder indices as integers, or as categories without an order; cmaes takes integers only.
        objectives: score alone, or score and bytes; auto is both for nsga2 and the score for all others.
        sampler_options: further options of Optuna's class for the sampler, by their names there.
    """

    def __init__(
        self,
        sampler: Literal["tpe", "cmaes", "random", "nsga2", "gp"] = "tpe",
        offspring: int = 25,
        encoding: Literal["ordinal", "categorical"] = "ordinal",
        objectives: Literal["auto", "score", "score_and_bytes"] = "auto",
        sampler_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(offspring)
        if sampler == "cmaes" and (encoding != "ordinal" or objectives == "score_and_bytes"):
            raise ConfigurationError(
                "optuna: cmaes takes encoding 'ordinal' and the score as its one objective, got "
                f"{encoding!r} and {objectives!r}"
            )
        self.sampler = sampler
        self.encoding = encoding
        self.objectives = objectives
        self.sampler_options = dict(sampler_options or {})
        self._check_sampler()
        self._notes: dict[str, dict[str, Any]] = {}

    def begin(self, proposer: Proposer, ladder: FidelityLadder) -> None:
        """Forget everything."""
        super().begin(proposer, ladder)
        self._notes = {}

    def proposals(
        self, history: History, rng: np.random.Generator, *, size: int, known: Collection[Configuration]
    ) -> tuple[Candidate, ...]:
        """What the sampler suggests, repaired; a neighbour of it where that is known."""
        from qratk_optuna._study import Board

        found: dict[Configuration, Candidate] = {}
        with Board(self, self.proposer.problem, history, self._notes, seed=int(rng.integers(2**31 - 1))) as board:
            while len(found) < size:
                candidate = self._candidate(board, {*known, *found}, rng)
                if candidate is None:
                    break
                found[candidate.configuration] = candidate
            self._notes.update(board.notes)
        return tuple(found.values())

    @property
    def two_objectives(self) -> bool:
        """Whether bytes are an objective beside the score."""
        return self.objectives == "score_and_bytes" or (self.objectives == "auto" and self.sampler == "nsga2")

    def state(self) -> dict[str, Any]:
        """The generation, and what the sampler noted of its own suggestions: plain numbers, by configuration."""
        return {**super().state(), "notes": self._notes}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        super().restore(state)
        self._notes = {text: dict(notes) for text, notes in state["notes"].items()}

    def _candidate(self, board: Board, taken: set[Configuration], rng: np.random.Generator) -> Candidate | None:
        """New feasible candidate; None when the sampler and its neighbourhood have nothing new."""
        repaired = None
        for _ in range(TRIES):
            suggested = board.suggest()
            repaired = self.proposer.repaired(suggested)
            if repaired is not None and repaired not in taken:
                board.run(repaired)
                return Candidate(repaired, f"optuna:{self.sampler}", generation=self.generation)
        if repaired is None:
            return None
        near = self.proposer.propose(repaired, rng, known=taken, generation=self.generation)
        if near is not None:
            board.run(near.configuration)
        return near

    def _check_sampler(self) -> None:
        from qratk_optuna._study import make_sampler

        if "seed" in self.sampler_options:
            raise ConfigurationError("optuna: the search's own seed decides, leave 'seed' out of sampler_options")
        make_sampler(self.sampler, self.sampler_options, offspring=self.offspring, seed=0)


def standings(problem: Problem, history: History) -> dict[Configuration, float]:
    """Normal score of each configuration's place in rung-major order; larger is better.

    Scores at different rungs do not compare: what reached a higher rung stands above what did not, within a rung the
    score decides, and failures stand below all. Equal ones share a place. Samplers that look at the order alone (TPE,
    CMA-ES, NSGA-II) lose nothing by the transform, and a Gaussian process gets well-behaved values (Salinas, Shen and
    Perrone 2020, section 3).
    """
    from scipy.special import ndtri

    reached: dict[Configuration, tuple[bool, int, float]] = {}
    for e in history:
        key = (e.ok, e.steps, e.score if e.ok else 0.0)
        reached[e.configuration] = max(reached.get(e.configuration, (False, 0, 0.0)), key)
    keys = sorted(reached.values())
    places = {key: (keys.index(key) + len(keys) - 1 - keys[::-1].index(key)) / 2 for key in set(keys)}
    return {c: float(ndtri((places[key] + 0.5) / len(keys))) for c, key in reached.items()}
