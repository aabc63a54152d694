"""No search: configurations that someone wrote down, for baselines and for questions."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Final

from qratk.core.configuration import Configuration, LayerChoice, unique
from qratk.core.errors import ConfigurationError
from qratk.core.evaluation import Candidate, FidelityLadder
from qratk.core.memory import format_bytes
from qratk.core.problem import Problem
from qratk.mutations.proposer import Proposer
from qratk.searchers.base import searchers
from qratk.searchers.generations import SingleGenerationSearcher

LARGEST: Final = "largest"


@searchers.register("fixed")
class FixedConfigurations(SingleGenerationSearcher):
    """Proposes the given configurations, all in one generation; one that does not fit the budget is an error.

    Args:
        configurations: in the text form of a configuration, as in "4:8*12". Where the search has shared settings and
            one says nothing of them, it is measured with all of them at the lowest rung, and the best go up.
        patterns: one configuration as {regular expression of a layer's name: [bits, rank]}; the first match holds.
            The rank `largest` is the highest of the ladder, the same for all layers that ask for it, that fits the
            budget.
    """

    def __init__(
        self, configurations: Sequence[str] = (), patterns: Mapping[str, Sequence[int | str]] | None = None
    ) -> None:
        super().__init__()
        if not configurations and not patterns:
            raise ConfigurationError("fixed: give configurations, as in ['4:8*12'], or patterns of layer names")
        self.configurations = tuple(Configuration.from_text(text) for text in configurations)
        self.patterns = {pattern: _choice(pattern, given) for pattern, given in (patterns or {}).items()}

    def begin(self, proposer: Proposer, ladder: FidelityLadder) -> None:
        """Check the configurations; raises `ConfigurationError` for one off the ladders or over the budget."""
        super().begin(proposer, ladder)
        for configuration in self._wanted(proposer.problem):
            _check(proposer.problem, proposer.problem.space.settled(configuration))

    def _wanted(self, problem: Problem) -> tuple[Configuration, ...]:
        by_name = (self._matched(problem),) if self.patterns else ()
        return unique((*self.configurations, *by_name))

    def _matched(self, problem: Problem) -> Configuration:
        """Configuration by the layers' names; a pattern that matches none, and a layer without one, are errors."""
        names, used, chosen = problem.space.layer_names, set[str](), list[tuple[int, int | None]]()
        for name in names:
            found = next((pattern for pattern in self.patterns if re.search(pattern, name)), None)
            if found is None:
                raise ConfigurationError(f"fixed: no pattern matches the layer {name!r}; add one, '.' matches all")
            used.add(found)
            chosen.append(self.patterns[found])
        for pattern in self.patterns.keys() - used:
            raise ConfigurationError(f"fixed: the pattern {pattern!r} matches no layer; layers are as {names[0]!r}")
        if all(rank is not None for _, rank in chosen):
            return _filled(chosen, 0)
        filled = [problem.space.settled(_filled(chosen, rank)) for rank in problem.space.ranks]
        problem.space.validate(filled[0])
        fitting = [configuration for configuration in filled if problem.feasible(configuration)]
        return (fitting[-1] if fitting else filled[0]).with_shared(())

    def candidates(self, problem: Problem, known: Collection[Configuration]) -> tuple[Candidate, ...]:
        return tuple(Candidate(c, "fixed") for c in self._wanted(problem) if c not in known)

    def schedule(self, ladder: FidelityLadder, candidates: int, high: int) -> tuple[tuple[int, int], ...]:
        """The highest rung alone: all of them are wanted."""
        return ((ladder.highest, candidates),)

    @property
    def generation_size(self) -> int:
        """How many there are."""
        return len(self.configurations) + bool(self.patterns)


def _choice(pattern: str, given: Sequence[int | str]) -> tuple[int, int | None]:
    """Bits and rank of a pattern, None for the largest rank; raises `ConfigurationError`."""
    with suppress(ValueError):
        bits, rank = given
        return int(bits), None if rank == LARGEST else int(rank)
    raise ConfigurationError(
        f"fixed: a pattern's choice is [bits, rank], as in [4, 16] or [4, {LARGEST}]; got {given} for {pattern!r}"
    )


def _filled(chosen: Sequence[tuple[int, int | None]], largest: int) -> Configuration:
    return Configuration(tuple(LayerChoice(bits, largest if rank is None else rank) for bits, rank in chosen))


def _check(problem: Problem, configuration: Configuration) -> None:
    problem.space.validate(configuration)
    if not problem.feasible(configuration):
        raise ConfigurationError(
            f"fixed: {configuration} takes {format_bytes(problem.bytes(configuration))}, over the budget of "
            f"{format_bytes(problem.budget.limit_bytes)}; raise the budget or lower the configuration"
        )
